"""A whole answer, and a target of several tokens: the same numbers as token by token, for less."""

import by_hand
import pytest
import torch
from watching import rows_run

from helpers import METHODS, ask, attribute, tiny_llama
from helpers.attribution import baseline_embeds, embed_prompt, objective
from helpers.attribution.path import FIRST_EVALUATIONS

PROMPT, TEXT = "Riga is in", " eu "
T = len(TEXT)
LINEAR = ["gradient_x_input", "relevance", "alti_logit", "occlusion", "shapley", "coalitions"]

DRAWN = {"random", "shapley", "coalitions", "find_then_rank"}  # by a draw that is of the prompt
every_method = pytest.mark.parametrize("method", METHODS)


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def question(tiny):
    return ask(*tiny, PROMPT, answer=TEXT)


def step(tiny, place):
    """The question that asks for one token of the answer, after all before it."""
    return ask(*tiny, PROMPT + TEXT[:place], target=TEXT[place])


# --- the question ------------------------------------------------------------------------------


def test_the_answer_is_the_models_own_and_its_tokens_are_units(tiny):
    question = ask(*tiny, PROMPT, answer=T)
    ids = question.input_ids[0].tolist()
    for token in question.target:
        assert token == tiny[0](torch.tensor([ids])).logits[0, -1].argmax()
        ids.append(token)
    assert len(question.target) == T
    assert [unit.part for unit in question.units] == ["prompt"] * 10 + ["answer"] * (T - 1)
    assert [unit.positions for unit in question.units] == [(place,) for place in range(9 + T)]


def test_a_target_of_several_tokens_is_the_answer_given_as_text(tiny):
    target, answer = ask(*tiny, PROMPT, target="abc"), ask(*tiny, PROMPT, answer="abc")
    assert target.target == answer.target and target.units == answer.units
    for method in ("saliency", "occlusion"):
        assert torch.equal(*(attribute(tiny[0], q, method).scores for q in (target, answer)))


# --- a row an output ---------------------------------------------------------------------------


@every_method
def test_every_method_gives_one_row_an_output_and_nothing_for_what_was_not_read(
    tiny, question, method
):
    result = attribute(tiny[0], question, method, each=True)
    assert result.each.shape == (T, len(PROMPT) + T - 1) and len(result.outputs) == T
    assert result.outputs == tuple(TEXT)
    if method == "random":
        return
    for t, row in enumerate(result.each):
        assert (row[len(PROMPT) + t :].abs() < 1e-5).all()
        assert (row[: len(PROMPT) + t] != 0).any()


# of methods that sample, each row is another sample
@pytest.mark.parametrize("method", sorted(METHODS.keys() - DRAWN))
def test_a_row_is_the_attribution_of_its_own_question(tiny, question, method):
    options = {}
    if method == "integrated_gradients":
        options = {"tolerance": 1e-5, "max_evaluations": 4000}
    result = attribute(tiny[0], question, method, each=True, **options)
    for t in range(T):
        alone = attribute(tiny[0], step(tiny, t), method, **options)
        row = result.each[t, : len(alone.scores)]
        same(row, alone.scores, 5e-4 if options else 1e-4)
        if result.gaps is not None:
            assert result.gaps[t].item() == pytest.approx(alone.gap, abs=1e-3)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"key_value_heads": 1}])
def test_rows_of_a_linear_method_add_up_to_the_scores_of_the_sum(method, options):
    model, tokenizer = tiny_llama(**options)
    question = ask(model, tokenizer, PROMPT, answer=T)
    summed, every = (attribute(model, question, method, each=each) for each in (False, True))
    same(every.each.sum(dim=0), summed.scores)
    same(every.scores, summed.scores)


@pytest.mark.parametrize("method", LINEAR[:3])
def test_rows_add_up_on_the_bundled_model(bundled, method):
    question = ask(*bundled, "The capital of Latvia is", answer=3)
    summed, every = (attribute(bundled[0], question, method, each=each) for each in (False, True))
    near = 1e-4 * float(every.each.abs().max())
    assert (every.each.sum(dim=0) - summed.scores).abs().max() < near


def test_saliency_of_an_answer_is_the_norm_of_the_summed_gradient(tiny, question):
    result = attribute(tiny[0], question, "saliency", each=True)
    same(result.scores, by_hand.gradient(tiny[0], question)[0].norm(dim=-1))
    fewer = slice(0, len(PROMPT))  # which all outputs read: the norm is not the sum of the norms
    assert (result.scores < result.each.sum(dim=0))[fewer].all()
    embeds = by_hand.columns(tiny[0], question).requires_grad_(True)
    for t, value in enumerate(by_hand.each_value(tiny[0], question, embeds)[0]):
        (grad,) = torch.autograd.grad(value, embeds, retain_graph=True)
        same(result.each[t], grad[0].norm(dim=-1))


@pytest.mark.parametrize("method", ["saliency", "relevance", "alti_logit", "occlusion"])
def test_what_is_written_later_does_not_change_an_earlier_row(tiny, method):
    rows = [
        attribute(tiny[0], ask(*tiny, PROMPT, target=text), method, each=True).each
        for text in ("abcd", "abxy")
    ]
    same(rows[0][:2], rows[1][:2], 1e-5)
    assert not torch.allclose(rows[0][2:], rows[1][2:], atol=1e-2)


def test_the_rows_of_a_contrast_name_the_foils_tokens_and_count_them_against(tiny):
    question = ask(*tiny, PROMPT, target="ab", foil="xyz")
    result = attribute(tiny[0], question, "gradient_x_input", each=True)
    assert result.outputs == ("a", "b", "y", "z")  # a against x, then each by itself
    embeds = embed_prompt(tiny[0], question).requires_grad_(True)
    each = by_hand.each_value(tiny[0], question, embeds)[0]  # a, b, -x, -y, -z
    values = [each[0] + each[2], each[1], each[3], each[4]]
    for row, value in zip(result.each, values, strict=True):
        (grad,) = torch.autograd.grad(value, embeds, retain_graph=True)
        same(row, (grad * embeds).sum(dim=-1)[0].detach(), 1e-5)


# --- integrated gradients of many outputs ------------------------------------------------------


def test_one_output_is_the_same_with_and_without_rows(tiny):
    question = ask(*tiny, PROMPT, target="a")
    for tolerance in (0.02, 1e-5):
        options = {"method": "integrated_gradients", "tolerance": tolerance}
        one, alone = (attribute(tiny[0], question, each=each, **options) for each in (True, False))
        same(one.each[0], alone.scores, 1e-6)
        same(one.errors, alone.errors, 1e-6)
        assert one.evaluations == alone.evaluations


def test_every_row_of_integrated_gradients_adds_up(tiny, question):
    result = attribute(tiny[0], question, "integrated_gradients", each=True, tolerance=1e-3)
    end = by_hand.columns(tiny[0], question)
    start = torch.zeros_like(end) + tiny[0].get_input_embeddings().weight.mean(dim=0)
    with torch.no_grad():
        moved = by_hand.each_value(tiny[0], question, end)[0]
        moved = moved - by_hand.each_value(tiny[0], question, start)[0]
    off = (result.each.sum(dim=1) - moved).abs() / moved.abs().clamp(min=1)
    assert (off <= 1.1e-3).all()
    same(result.gaps, off, 1e-4)
    assert result.closed and result.errors.shape == result.scores.shape


def test_rows_that_do_not_close_say_so(tiny, question):
    options = {"tolerance": 1e-7, "max_evaluations": FIRST_EVALUATIONS}
    result = attribute(tiny[0], question, "integrated_gradients", each=True, **options)
    assert result.closed is False and (result.gaps > 1e-7).all()
    assert result.evaluations == FIRST_EVALUATIONS
    assert any("did not close" in note for note in result.notes)


# --- what it costs, and words ------------------------------------------------------------------


def test_occlusion_takes_one_row_a_token_for_the_whole_answer(tiny, question):
    result, gradients, rows = rows_run(
        tiny[0], lambda: attribute(tiny[0], question, "occlusion", each=True)
    )
    assert (gradients, rows) == (0, len(PROMPT) + T) and result.forwards == rows


@pytest.mark.parametrize("method", ["gradient_x_input", "relevance", "attention", "alti_logit"])
def test_words_of_an_answer_have_the_sum_of_their_tokens(tiny, method):
    """Scores and rows: an additive method gives a unit what its tokens have together."""
    texts = {"target": "not in Riga"}
    fine, coarse = (ask(*tiny, "Is it in", units=units, **texts) for units in ("tokens", "words"))
    labels = ["Is", " it", " in", "not", " in", " Rig"]  # nothing was written after the last token
    assert [unit.label for unit in coarse.units] == labels
    tokens, words = (attribute(tiny[0], q, method, each=True) for q in (fine, coarse))
    same(words.scores, by_hand.per_unit(tokens.scores, coarse))
    for token_row, word_row in zip(tokens.each, words.each, strict=True):
        same(word_row, by_hand.per_unit(token_row, coarse))


def test_a_baseline_replaces_the_prompt_and_not_the_foils_branch(tiny):
    """From the baseline on, what is explained is the prompt: the branches stay what they are."""
    question = ask(*tiny, PROMPT, target="ab", foil="cd")
    result = attribute(tiny[0], question, "integrated_gradients", tolerance=1e-3)
    ends = [baseline_embeds(tiny[0], question), embed_prompt(tiny[0], question)]
    start, end = objective(tiny[0], torch.cat(ends), question)
    assert abs(result.scores.sum() - (end - start)) <= 1.1e-3 * max(1, abs(end - start))
