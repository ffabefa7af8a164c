"""Many prompts in one pass give what each gives alone, whatever is beside them."""

import time
from dataclasses import replace

import pytest
import torch
from linear_model import LinearCausalModel
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, load_model, tiny_llama
from helpers.attribution.batches import BATCHED, Answered, ask_many, attribute_many

VARIANTS = {
    "plain": {},
    "one key-value head": {"key_value_heads": 1},
    "as many key-value heads as queries": {"key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
}
# several lengths, alone and together; a token alone; target and foil, one of them, none; the chat
ENTRIES = [
    {"prompt": "a"},
    {"prompt": "b", "target": "c", "foil": "d"},
    {"prompt": "Riga is in", "foil": "b"},
    {"prompt": "Oslo is in"},
    {"prompt": "Rome is in", "target": "L", "foil": "N"},
    {"prompt": "The keys to the cabinet", "target": "a"},
    {"prompt": "a long prompt " * 5},
    {"prompt": "Hi", "chat": True, "foil": "b"},
    {"prompt": "Ho", "chat": True},
    {"prompt": "你好 🙂"},
]
REAL = [
    {"prompt": "The capital city of Latvia is", "target": " Rig", "foil": " Tall"},
    {"prompt": "The capital city of Norway is"},
    {"prompt": "The keys to the old wooden cabinet", "foil": " is"},
    {"prompt": "Hi", "chat": True, "target": "Hello"},
    {"prompt": "Hello"},
]
CHEAP = [name for name in METHODS if name not in ("integrated_gradients", "shapley", "alti_logit")]


def same(found, single):
    """Equal to 1e-4 of the prompt's largest score, and with the same evidence."""
    largest = float(single.scores.abs().max())
    assert (found.scores - single.scores).abs().max() <= 1e-4 * largest
    assert found.scores.dtype == torch.float32 and found.method == single.method
    for name in ("evaluations", "forwards", "signed", "closed"):
        assert getattr(found, name) == getattr(single, name), name
    assert found.gap == (None if single.gap is None else pytest.approx(single.gap, abs=1e-3))


def left_as_found(model, run):
    """Run, and see that weights, output layer, hooks and attention are what they were."""
    head, weights = model.get_output_embeddings(), list(model.parameters())
    wanted = [weight.requires_grad for weight in weights]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    try:
        return run()
    finally:
        assert model.get_output_embeddings() is head
        assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
        assert [weight.requires_grad for weight in weights] == wanted
        now = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert now == hooks
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_scores_are_the_single_ones(variant):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    model.requires_grad_(True)
    questions = ask_many(model, tokenizer, ENTRIES)
    answers = left_as_found(model, lambda: attribute_many(model, questions, CHEAP))
    by_method = {method: attribute_many(model, questions, [method]) for method in CHEAP}
    for place, (entry, answer) in enumerate(zip(ENTRIES, answers, strict=True)):
        assert list(answer.results) == CHEAP and answer.target == questions[place].target
        alone = ask(model, tokenizer, **entry)
        for method in CHEAP:
            single = attribute(model, alone, method)
            same(answer.results[method], single)
            same(by_method[method][place].results[method], single)


def test_batched_scores_are_the_single_ones_on_the_bundled_model(bundled):
    model, tokenizer = bundled
    methods = list(BATCHED)
    open_questions = ask_many(model, tokenizer, REAL, open_targets=True)
    answers = left_as_found(model, lambda: attribute_many(model, open_questions, methods))
    for entry, answer in zip(REAL, answers, strict=True):
        alone = ask(model, tokenizer, **entry)
        assert answer.target == alone.target
        for method, result in answer.results.items():
            same(result, attribute(model, alone, method))


def test_every_method_runs_and_is_the_single_one(tiny):
    model, tokenizer = tiny
    questions = ask_many(model, tokenizer, ENTRIES[2:4])
    for question, answer in zip(questions, attribute_many(model, questions, METHODS), strict=True):
        assert set(answer.results) == set(METHODS)
        for method, result in answer.results.items():
            same(result, attribute(model, question, method))


def test_what_is_asked_of_many_is_what_is_asked_of_one(tiny):
    found = ask_many(*tiny, ENTRIES)
    for entry, question in zip(ENTRIES, found, strict=True):
        alone = ask(*tiny, **entry)
        assert torch.equal(question.input_ids, alone.input_ids)
        same_ids = {"input_ids": alone.input_ids}
        assert replace(question, **same_ids) == replace(alone, **same_ids)


def test_a_bad_entry_has_its_error_at_its_place_and_the_others_their_questions(tiny):
    (own,) = ask_many(*tiny, [{"prompt": "Riga is in"}])
    bad = [
        {"prompt": "  "},
        {"prompt": "a\ud800"},
        {"prompt": "a", "target": "two"},
        {"prompt": "a" * 3000},
        {"prompt": "Riga is in", "foil": own.target},  # known only once the model was run
    ]
    entries = [ENTRIES[2], *bad, ENTRIES[0]]
    found = ask_many(*tiny, entries)
    assert [isinstance(question, InputError) for question in found] == [False, *[True] * 5, False]
    for entry, error in zip(bad, found[1:6], strict=True):
        with pytest.raises(InputError) as alone:
            ask(*tiny, **entry)
        assert str(error) == str(alone.value)


def test_a_foil_that_is_the_models_own_token_leaves_nothing_to_compare(tiny):
    (own,) = ask_many(*tiny, [{"prompt": "Riga is in"}])
    entries = [{"prompt": "Riga is in", "foil": own.target}, {"prompt": "Oslo is in"}]
    questions = ask_many(*tiny, entries, open_targets=True)
    first, second = attribute_many(tiny[0], questions, ["saliency", "shapley"])
    assert first.target == own.target and first.results == {}
    assert set(second.results) == {"saliency", "shapley"}


@pytest.mark.parametrize("method", ["random", "attention", "saliency", "occlusion", "alti_logit"])
def test_the_next_token_and_its_probability_are_the_models(tiny, method):
    model, tokenizer = tiny
    questions = ask_many(model, tokenizer, ENTRIES, open_targets=True)
    for entry, answer in zip(ENTRIES, attribute_many(model, questions, [method]), strict=True):
        alone = ask(model, tokenizer, **entry)
        with torch.no_grad():
            odds = model(alone.input_ids).logits[0, -1].softmax(dim=-1)
        assert answer.top == int(odds.argmax()) and answer.target == alone.target
        assert answer.top_probability == pytest.approx(float(odds.max()), rel=1e-4)
        assert answer.probability == pytest.approx(float(odds[alone.target]), rel=1e-4)


def test_no_pass_is_run_only_to_find_the_next_token(tiny):
    model, tokenizer = tiny
    entries = [{"prompt": text} for text in ("Riga is in", "Oslo is in", "Rome is in")]
    questions = ask_many(model, tokenizer, entries, open_targets=True)
    methods = ["saliency", "gradient_x_input", "random", "relevance"]
    _, gradients, forwards = rows_run(model, lambda: attribute_many(model, questions, methods))
    assert (gradients, forwards) == (3, 0)  # all three methods go back from one pass


@pytest.mark.parametrize("method", CHEAP)
def test_neither_order_nor_batch_size_matters(tiny, method, monkeypatch):
    model, tokenizer = tiny
    entries = ENTRIES * 3
    questions = ask_many(model, tokenizer, entries, open_targets=True)
    expected = attribute_many(model, questions, [method])
    turned = attribute_many(model, questions[::-1], [method])[::-1]
    monkeypatch.setattr("helpers.attribution.engine.token_budget", lambda model: 40)
    small = attribute_many(model, questions, [method])
    monkeypatch.setattr("helpers.attribution.batches.FULL_PASS", 10_000)  # positions together
    together = attribute_many(model, questions, [method])
    monkeypatch.setattr("helpers.attribution.batches.LOGITS_AT_ONCE", 1)
    rowwise = attribute_many(model, questions, [method])
    for others in (turned, small, together, rowwise):
        for answer, other in zip(expected, others, strict=True):
            assert answer.target == other.target
            same(other.results[method], answer.results[method])


def test_a_batch_that_does_not_fit_is_halved(tiny, monkeypatch):
    model, tokenizer = tiny
    questions = ask_many(model, tokenizer, [ENTRIES[3]] * 8, open_targets=True)
    sizes = []

    def refuse(module, args, named):
        sizes.append(len(named["inputs_embeds"]))
        if sizes[-1] > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        answers = left_as_found(model, lambda: attribute_many(model, questions, ["saliency"]))
    finally:
        handle.remove()
    assert sizes == [8, 4, 2, 2, 2, 2] and len(answers) == 8


@pytest.mark.parametrize(
    "methods",
    [["saliency", "relevance"], *([name] for name in BATCHED if name != "random")],
    ids=" and ".join,
)
def test_the_model_is_left_as_it_was_after_an_error_in_the_middle(tiny, methods):
    model, tokenizer = tiny
    questions = ask_many(model, tokenizer, ENTRIES)

    def fail(module, args):
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        left_as_found(model, lambda: attribute_many(model, questions, methods))
    handle.remove()


def test_seconds_add_up_to_the_time_that_was_spent(tiny):
    """Shared, not counted twice: the three that one forward pass gave have a third each."""
    questions = ask_many(*tiny, ENTRIES, open_targets=True)
    began = time.perf_counter()
    answers = attribute_many(tiny[0], questions, ["saliency", "gradient_x_input", "relevance"])
    took = time.perf_counter() - began
    seconds = [[result.seconds for result in answer.results.values()] for answer in answers]
    assert 0 < sum(map(sum, seconds)) < took
    assert all(first == second == third > 0 for first, second, third in seconds)


def test_bfloat16_runs_and_is_near(tiny_folder):
    model, tokenizer = load_model(str(tiny_folder), dtype="bfloat16")
    questions = ask_many(model, tokenizer, ENTRIES, open_targets=True)
    answers = left_as_found(model, lambda: attribute_many(model, questions, CHEAP))
    exact_model, _ = load_model(str(tiny_folder))
    for question, answer in zip(questions, answers, strict=True):
        single = attribute(exact_model, replace(question, target=answer.target), "saliency")
        near = answer.results["saliency"].scores
        assert all(result.scores.isfinite().all() for result in answer.results.values())
        assert (near - single.scores).abs().max() <= 0.2 * single.scores.abs().max()


def test_a_model_without_an_output_layer_runs_one_question_at_a_time(tiny):
    model = LinearCausalModel(tiny[1])
    questions = ask_many(model, tiny[1], [{"prompt": "Riga is in"}, {"prompt": "Oslo is in"}])
    answers = attribute_many(model, questions, ["saliency", "occlusion"])
    for question, answer in zip(questions, answers, strict=True):
        expected = model.known_scores(question)
        assert (answer.results["occlusion"].scores - expected).abs().max() < 1e-4
        same(answer.results["saliency"], attribute(model, question, "saliency"))


def test_another_architecture_with_an_output_layer_is_batched_too(tiny):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
    config = MistralConfig(vocab_size=len(tiny[1]), eos_token_id=0, **shape)
    model = MistralForCausalLM(config).eval()
    questions = ask_many(model, tiny[1], ENTRIES[:6])
    methods = ["saliency", "occlusion", "attention", "attention_rollout"]
    for question, answer in zip(questions, attribute_many(model, questions, methods), strict=True):
        for method, result in answer.results.items():
            same(result, attribute(model, question, method))


@pytest.mark.parametrize("method", ["relevance", "alti_logit", "astrology"])
def test_what_a_model_does_not_support_is_refused_before_anything_is_run(tiny, method):
    model = LinearCausalModel(tiny[1])
    questions = ask_many(model, tiny[1], [{"prompt": "Riga is in"}])

    def refused():
        with pytest.raises(InputError, match=r"Llama|There is no method 'astrology'"):
            attribute_many(model, questions, ["saliency", "occlusion", method])

    _, gradients, forwards = rows_run(model, refused)
    assert (gradients, forwards) == (0, 0)


def test_no_question_is_no_answer(tiny):
    assert attribute_many(tiny[0], [], ["saliency"]) == []
    (question,) = ask_many(*tiny, [{"prompt": "Riga is in"}])
    (answer,) = attribute_many(tiny[0], [question], ())
    assert isinstance(answer, Answered) and answer.results == {}
