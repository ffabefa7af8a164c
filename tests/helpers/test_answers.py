"""A whole answer explained: the same numbers as token by token, for less work."""

import logging

import pytest
import torch
from linear_model import LinearCausalModel
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, tiny_llama
from helpers.answers import (
    SHARED,
    answer,
    answer_questions,
    attribute_answer,
    merge_words,
)
from helpers.attribution import baseline_embeds, embed_prompt, objective
from helpers.attribution.path import FIRST_EVALUATIONS
from helpers.questions import encode, token_labels

PROMPT = "Riga is in"
T = 4

every_method = pytest.mark.parametrize("method", METHODS)
every_shared_method = pytest.mark.parametrize("method", SHARED)
cheap = pytest.mark.parametrize("method", ["saliency", "gradient_x_input", "occlusion"])


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def questions(tiny):
    return answer(*tiny, PROMPT, max_new_tokens=T)


# --- the answer --------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_each_question_reads_the_answer_so_far_and_asks_for_the_next_token(tiny, chat):
    ids = encode(tiny[1], PROMPT, chat=chat)
    questions = answer(*tiny, PROMPT, max_new_tokens=T, chat=chat)
    assert len(questions) == T
    for question in questions:
        assert question.input_ids.tolist() == [ids]
        assert question.target == tiny[0](question.input_ids).logits[0, -1].argmax()
        assert question.labels == token_labels(tiny[1], ids) and question.foil is None
        ids = [*ids, question.target]


def test_the_end_of_the_text_is_the_last_token_of_an_answer(tiny, questions):
    model, tokenizer = tiny_llama()
    model.generation_config.eos_token_id = questions[2].target
    found = answer(model, tokenizer, PROMPT, max_new_tokens=T)
    assert [question.target for question in found] == [q.target for q in questions[:3]]


def test_the_runner_up_is_the_second_best_token_at_its_own_step(tiny, questions):
    contrasted = answer(*tiny, PROMPT, max_new_tokens=T, runner_up=True)
    assert [question.target for question in contrasted] == [q.target for q in questions]
    for question in contrasted:
        best = tiny[0](question.input_ids).logits[0, -1].topk(2).indices.tolist()
        assert [question.target, question.foil] == best
        assert question.foil_label == tiny[1].decode([question.foil])


def test_what_a_model_says_about_sampling_is_neither_followed_nor_warned_about(questions, caplog):
    model, tokenizer = tiny_llama()
    model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.9, top_k=3)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    found = answer(model, tokenizer, PROMPT, max_new_tokens=T)
    library.removeHandler(caplog.handler)
    assert [question.target for question in found] == [q.target for q in questions]
    assert not caplog.records


@pytest.mark.parametrize(
    "prompt, most, says", [(PROMPT, 0, "at least 1"), ("a" * 2046, 8, "2,048"), (" ", 8, "empty")]
)
def test_an_answer_that_cannot_be_given_is_refused(tiny, prompt, most, says):
    with pytest.raises(InputError, match=says):
        answer(*tiny, prompt, max_new_tokens=most)


def test_an_unknown_method_is_refused(tiny, questions):
    with pytest.raises(InputError, match="no method 'lime'"):
        attribute_answer(tiny[0], questions, "lime")


# --- the matrix --------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("shared", [True, False])
def test_every_method_gives_one_row_an_output_and_nothing_for_what_was_not_read(
    tiny, questions, method, shared
):
    result = attribute_answer(tiny[0], questions, method, shared=shared)
    read = len(questions[-1].labels)
    assert result.scores.shape == (T, read) == (len(result.targets), len(result.labels))
    assert result.scores.dtype == torch.float32 and result.scores.isfinite().all()
    assert result.labels[: result.prompt_tokens] == list(PROMPT)
    assert result.labels[result.prompt_tokens :] == result.targets[:-1]
    for t, row in enumerate(result.scores):
        assert (row[result.prompt_tokens + t :] == 0).all()
        assert (row[: result.prompt_tokens + t] != 0).any()
    assert result.method == method and result.seconds > 0


@every_method
def test_a_row_by_itself_is_the_attribution_of_its_question(tiny, questions, method):
    result = attribute_answer(tiny[0], questions, method, shared=False)
    for t, question in enumerate(questions):
        alone = attribute(tiny[0], question, method)
        assert torch.equal(result.scores[t, : len(alone.scores)], alone.scores)
        assert (None if result.gaps is None else result.gaps[t].item()) == pytest.approx(alone.gap)
        assert (None if result.closed is None else result.closed[t].item()) == alone.closed
    assert result.signed == alone.signed


def test_what_is_written_later_does_not_change_an_earlier_row(tiny, questions):
    ids = torch.cat([questions[-1].input_ids, torch.tensor([[questions[-1].target]])], dim=1)
    other = ids.clone()
    other[0, -2:] = torch.tensor([70, 71])
    rows = [
        attribute_answer(tiny[0], answer_questions(tiny[1], PROMPT, some, len(PROMPT)), "occlusion")
        for some in (ids, other)
    ]
    same(rows[0].scores[:2], rows[1].scores[:2], 1e-5)
    assert not torch.allclose(rows[0].scores[2:], rows[1].scores[2:], atol=1e-2)


@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients", "occlusion"])
@pytest.mark.parametrize("baseline", ["mean", "eos"])
@pytest.mark.parametrize("foils", [None, [70, 71, 72]], ids=["no foils", "foils"])
def test_a_linear_model_gives_the_matrix_that_is_known(tiny, method, baseline, foils):
    linear = LinearCausalModel(tiny[1])
    ids = torch.tensor([tiny[1](PROMPT + " ab")["input_ids"]])
    questions = answer_questions(tiny[1], PROMPT, ids, len(PROMPT), foils)
    options = {} if method == "gradient_x_input" else {"baseline": baseline}
    result = attribute_answer(linear, questions, method, **options)
    for t, question in enumerate(questions):
        less = baseline_embeds(linear, question, **options) if options else 0
        known = linear.known_gradient(question) * (embed_prompt(linear, question) - less)[0]
        same(result.scores[t, : len(question.labels)], known.sum(dim=-1), 1e-5)
    assert method != "integrated_gradients" or result.gaps.max() < 1e-5


# --- one pass for all outputs ------------------------------------------------------------------


@cheap
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"key_value_heads": 1}])
@pytest.mark.parametrize("runner_up", [False, True])
def test_one_pass_for_all_outputs_gives_the_numbers_of_one_by_one(method, options, runner_up):
    model, tokenizer = tiny_llama(**options)
    questions = answer(model, tokenizer, PROMPT, max_new_tokens=T, runner_up=runner_up)
    together = attribute_answer(model, questions, method)
    same(together.scores, attribute_answer(model, questions, method, shared=False).scores)


@cheap
def test_one_pass_for_all_outputs_gives_the_numbers_of_one_by_one_on_the_bundled_model(
    bundled, method
):
    questions = answer(*bundled, "The capital of Latvia is", max_new_tokens=2, runner_up=True)
    together = attribute_answer(bundled[0], questions, method)
    alone = attribute_answer(bundled[0], questions, method, shared=False)
    same(together.scores, alone.scores)


@pytest.mark.parametrize("baseline", ["mean", "one vector"])
def test_integrated_gradients_together_equal_those_one_by_one(tiny, questions, baseline):
    if baseline == "one vector":
        baseline = torch.randn(32, generator=torch.Generator().manual_seed(0))
    options = {"baseline": baseline, "tolerance": 1e-5, "max_evaluations": 4000}
    method = "integrated_gradients"
    together = attribute_answer(tiny[0], questions, method, **options)
    alone = attribute_answer(tiny[0], questions, method, shared=False, **options)
    assert together.closed.all() and alone.closed.all()
    same(together.scores, alone.scores, 5e-4)


def test_one_output_is_the_attribution_of_its_question_to_the_last_evaluation(tiny, questions):
    for tolerance in (0.02, 1e-5):
        options = {"method": "integrated_gradients", "tolerance": tolerance}
        one = attribute_answer(tiny[0], questions[-1:], **options)
        alone = attribute(tiny[0], questions[-1], **options)
        same(one.scores[0], alone.scores, 1e-5)
        same(one.errors[0], alone.errors, 1e-5)
        assert one.evaluations == alone.evaluations


def test_every_row_of_integrated_gradients_adds_up(tiny, questions):
    result = attribute_answer(tiny[0], questions, "integrated_gradients", tolerance=1e-3)
    for t, question in enumerate(questions):
        ends = torch.cat([baseline_embeds(tiny[0], question), embed_prompt(tiny[0], question)])
        with torch.inference_mode():
            start, end = objective(tiny[0], ends, question).tolist()
        off = abs(result.scores[t].sum().item() - (end - start)) / max(abs(end - start), 1)
        assert off <= 1e-3 and result.gaps[t].item() == pytest.approx(off, abs=1e-5)
    assert result.closed.all() and result.errors.shape == result.scores.shape


def test_rows_that_do_not_close_say_so(tiny, questions):
    options = {"tolerance": 1e-7, "max_evaluations": FIRST_EVALUATIONS}
    result = attribute_answer(tiny[0], questions, "integrated_gradients", **options)
    assert not result.closed.any() and (result.gaps > 1e-7).all()
    assert result.evaluations == FIRST_EVALUATIONS


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"max_evaluations": 5}])
def test_a_budget_that_cannot_be_kept_is_refused(tiny, questions, options):
    with pytest.raises(InputError, match="at least 33 evaluations"):
        attribute_answer(tiny[0], questions, "integrated_gradients", **options)


# --- what it costs -----------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("shared", [True, False])
def test_the_counts_are_the_rows_that_were_run(tiny, questions, method, shared):
    result, with_gradient, without = rows_run(
        tiny[0], lambda: attribute_answer(tiny[0], questions, method, shared=shared)
    )
    assert (result.evaluations, result.forwards) == (with_gradient, without)
    each = T if shared and method in SHARED else 1
    assert result.backwards == each * result.evaluations


def test_occlusion_takes_one_row_a_token_for_the_whole_answer(tiny, questions):
    together, alone = (
        attribute_answer(tiny[0], questions, "occlusion", shared=shared) for shared in (True, False)
    )
    prompt = len(PROMPT)
    assert together.forwards == prompt + T
    assert alone.forwards == sum(prompt + t + 1 for t in range(T))


@every_shared_method
@pytest.mark.parametrize("runner_up, logits", [(False, T), (True, 2 * T)])
def test_no_logit_is_computed_that_is_not_asked_for(tiny, method, runner_up, logits):
    questions = answer(*tiny, PROMPT, max_new_tokens=T, runner_up=runner_up)
    shapes = set()
    handle = tiny[0].register_forward_hook(lambda m, i, out: shapes.add(out.logits.shape[1:]))
    attribute_answer(tiny[0], questions, method)
    handle.remove()
    assert shapes == {(T, logits)}


# --- the model ---------------------------------------------------------------------------------


def state(model):
    modules = list(model.modules())
    return (
        [(id(module), len(module._forward_hooks)) for module in modules],
        [len(module._forward_pre_hooks) for module in modules],
        [(id(weight), weight.requires_grad, weight.grad) for weight in model.parameters()],
        model.config._attn_implementation,
    )


@every_shared_method
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(method, fails):
    model, tokenizer = tiny_llama()
    questions = answer(model, tokenizer, PROMPT, max_new_tokens=T)
    model.requires_grad_(True)

    def out_of_memory(module, inputs):
        raise MemoryError("half way through the model")

    if fails:
        model.model.layers[1].register_forward_pre_hook(out_of_memory)
    before = state(model)
    try:
        attribute_answer(model, questions, method, precision="bfloat16")
    except MemoryError:
        assert fails
    else:
        assert not fails
    assert state(model) == before


@every_shared_method
def test_a_bfloat16_model_gives_about_the_same_matrix(tiny, questions, method):
    model, _ = tiny_llama()
    exact = attribute_answer(tiny[0], questions, method)
    half = attribute_answer(model.to(torch.bfloat16), questions, method)
    assert half.scores.dtype == torch.float32 and half.scores.isfinite().all()
    assert (half.scores - exact.scores).norm() < 0.2 * exact.scores.norm()


# --- words -------------------------------------------------------------------------------------

TEXTS = {
    "The capital is Riga.": ["The", " capital", " is", " Riga", "."],
    "in 1991, twice": ["in", " 1991", ",", " twice"],
    "sum(xs)/2": ["sum", "(", "xs", ")/", "2"],
    "naïve 你好 🙂": ["naïve", " 你好", " 🙂"],
}


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_what_a_reader_takes_for_words(bundled, text):
    labels = token_labels(bundled[1], encode(bundled[1], text))
    words, _ = merge_words(labels, torch.zeros(len(labels)))
    assert words == TEXTS[text]


@pytest.mark.parametrize("name", ["tiny", "bundled"])
def test_joining_the_words_gives_the_text(request, hostile, name):
    tokenizer = request.getfixturevalue(name)[1]
    labels = token_labels(tokenizer, encode(tokenizer, hostile))
    words, _ = merge_words(labels, torch.zeros(len(labels)))
    assert "".join(words) == hostile


def test_sums_are_kept_and_each_score_goes_to_its_own_word():
    labels = ["<|user|>", " Rig", "a", "你[1/2]", "你[2/2]", "!", " "]
    scores = torch.tensor([[1, 2, 4, 8, 16, 32, 64], [0, 0, 1, 0, 0, 0, 3]]) / 8
    words, merged = merge_words(labels, scores)
    assert words == ["<|user|>", " Riga你", "!", " "]
    assert merged.tolist() == [[1 / 8, 30 / 8, 4, 8], [0, 1 / 8, 0, 3 / 8]]
    assert torch.equal(merged.sum(dim=1), scores.sum(dim=1))
    assert torch.equal(merge_words(labels, scores[0])[1], merged[0])


def test_rows_are_merged_like_columns_when_turned(tiny, questions):
    result = attribute_answer(tiny[0], questions, "occlusion")
    words, turned = merge_words(result.targets, result.scores.T)  # [read, words]
    assert len(words) == turned.shape[1] <= T
    same(turned.sum(), result.scores.sum(), 1e-5)


def test_the_answer_to_a_question_of_one_token_begins_as_ask_says(tiny):
    (only,) = answer(*tiny, "R", max_new_tokens=1)
    assert only.target == ask(*tiny, "R").target
    assert attribute_answer(tiny[0], [only], "occlusion").scores.shape == (1, 1)
