"""Attributions against answers known some other way: by hand, by Captum, by finite differences."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import by_hand
import captum.attr
import pytest
import torch
import yaml
from linear_model import LinearCausalModel
from llama3_rope import LLAMA3_ROPE
from running import few
from transformers import AttentionInterface, AttentionMaskInterface
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, attribute_all, tiny_llama
from helpers.attribution import (
    BUDGET,
    Method,
    Price,
    asking,
    attributions,
    baseline_embeds,
    completeness_gap,
    embed_prompt,
    fixed_step_integrated_gradients,
    objective,
    objective_gradient,
)
from helpers.attribution.attention import attention_rows
from helpers.attribution.methods import erasure_price, options_of
from helpers.attribution.path import FIRST_EVALUATIONS
from helpers.questions import read_question

PROMPT = "Riga is in"
PROMPTS = Path(__file__).parents[2] / "benchmarks" / "prompts" / "tuning.yml"
VARIANTS = {
    "one key-value head": {"key_value_heads": 1},
    "two key-value heads": {"key_value_heads": 2},
    "four key-value heads": {"key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}

SHAPES = {
    "next token": {},
    "foil": {"target": "a", "foil": "b"},
    "two tokens": {"target": "ab"},
    "two texts": {"target": "ab", "foil": "cd"},
    "a longer foil": {"target": "a", "foil": "bcd"},
    "a longer target": {"target": "abc", "foil": "d"},
    "a shared beginning": {"target": "abc", "foil": "abd"},
    "two texts that begin alike": {"target": "axy", "foil": "abcd"},
    "words": {"units": "words", "target": "a b", "foil": "c"},
    "an answer in words": {"units": "words", "target": "is it"},
    "raw logits": {"target": "ab", "objective": "logit"},
    "raw logits in two texts": {"target": "ab", "foil": "cde", "objective": "logit"},
}

every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize("shape", SHAPES)
with_and_without_foil = pytest.mark.parametrize("foil", [None, "b"], ids=["no foil", "foil"])


@pytest.fixture(scope="module")
def linear(tiny):
    return LinearCausalModel(tiny[1])


def a_question(tiny, **options):
    return ask(*tiny, PROMPT, **options)


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


# --- a model on which the right answer is known ------------------------------------------------


SIGNED = ["gradient_x_input", "integrated_gradients", "occlusion", "shapley"]
LINEAR = {  # questions whose objective is linear in this model
    "foil": {"target": "a", "foil": "b"},
    "logit": {"target": "a", "objective": "logit"},
    "three logits": {"target": "abc", "objective": "logit"},
}
every_linear_question = pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)


@every_linear_question
@pytest.mark.parametrize("method", SIGNED)
def test_signed_methods_are_exact_on_a_linear_model(linear, tiny, method, options):
    question = ask(linear, tiny[1], PROMPT, **options)
    known = linear.known_scores(question)
    assert known.abs().min() < known.abs().max()  # the answer is not a constant
    same(attribute(linear, question, method).scores, known, 1e-5)


@pytest.mark.parametrize("method", SIGNED)
def test_every_row_is_exact_on_a_linear_model(linear, tiny, method):
    question = ask(linear, tiny[1], PROMPT, **LINEAR["three logits"])
    result = attribute(linear, question, method, each=True)
    same(result.each, linear.known_rows(question), 1e-5)
    assert result.outputs == ("a", "b", "c")


@pytest.mark.parametrize("method", SIGNED)
def test_a_unit_of_a_linear_model_has_the_sum_of_its_tokens(linear, tiny, method):
    question = ask(linear, tiny[1], PROMPT, units="words", **LINEAR["three logits"])
    known = by_hand.per_unit(linear.known_scores(question), question)
    assert [unit.label for unit in question.units] == ["Riga", " is", " in", "ab"]
    same(attribute(linear, question, method).scores, known, 1e-5)


@every_linear_question
def test_saliency_is_the_norm_of_the_known_gradient(linear, tiny, options):
    question = ask(linear, tiny[1], PROMPT, **options)
    result = attribute(linear, question, "saliency", each=True)
    same(result.scores, linear.known_gradient(question).norm(dim=1))
    same(result.each, linear.known_gradients(question).norm(dim=2))


@pytest.mark.parametrize("method", ["relevance", "gradient_x_input"])
def test_the_scores_of_tokens_make_those_of_any_units(tiny, method):
    options = {"target": "abc", "foil": "b"}
    words = attribute(tiny[0], a_question(tiny, units="words", **options), method)
    tokens = attribute(tiny[0], a_question(tiny, **options), method)
    same(words.tokens, tokens.scores, 1e-5)
    same(words.tokens, tokens.tokens, 1e-5)
    sums = [words.tokens[list(unit.positions)].sum() for unit in words.units]
    same(words.scores, torch.stack(sums), 1e-5)


@pytest.mark.parametrize("baseline", ["mean", "zero", "eos"])
def test_integrated_gradients_have_no_gap_on_a_linear_model(linear, tiny, baseline):
    question = ask(linear, tiny[1], PROMPT, target="a", foil="b")
    assert attribute(linear, question, "integrated_gradients", baseline=baseline).gap < 1e-5


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion", "shapley"])
def test_scores_are_relative_to_the_baseline(linear, tiny, method):
    question = ask(linear, tiny[1], PROMPT, target="a", foil="b")
    from_eos = linear.embed(question.input_ids[0]) - linear.embed.weight[tiny[1].eos_token_id]
    known = (linear.known_gradient(question) * from_eos).sum(dim=1)
    name = "baseline" if method == "integrated_gradients" else "replacement"
    same(attribute(linear, question, method, **{name: "eos"}).scores, known, 1e-5)


def test_the_linear_model_is_causal_and_its_mean_embedding_zero(linear, tiny):
    ids = torch.tensor([tiny[1](PROMPT)["input_ids"]])
    changed = ids.clone()
    changed[0, -1] = 7
    before, after = linear(ids).logits, linear(changed).logits
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
    assert linear.embed.weight.mean(dim=0).tolist() == [0] * linear.embed.embedding_dim


# --- what every method returns -----------------------------------------------------------------


def test_methods_hold_what_the_notebooks_compare():
    needed = (
        "saliency gradient_x_input attention attention_rollout integrated_gradients occlusion "
        "shapley relevance random"
    )
    assert set(needed.split()) <= set(METHODS)


def check_result(result, question, method):
    assert result.scores.shape == (len(question.units),)
    assert result.units is question.units
    assert result.scores.dtype == torch.float32
    assert result.scores.device.type == "cpu"
    assert not result.scores.requires_grad
    assert result.scores.isfinite().all()
    assert result.signed == METHODS[method].signed
    assert result.signed or (result.scores >= 0).all()
    assert result.gap is None or result.gap >= 0
    assert result.method == method
    assert result.seconds > 0


@every_method
@every_shape
def test_every_method_scores_each_unit_with_one_finite_number(tiny, method, shape):
    question = a_question(tiny, **SHAPES[shape])
    result = attribute(tiny[0], question, method)
    check_result(result, question, method)
    assert result.each is None and result.outputs == ()
    every = attribute(tiny[0], question, method, each=True)
    check_result(every, question, method)
    assert every.each.shape == (len(every.outputs), len(question.units))
    assert every.each.isfinite().all()


@pytest.mark.parametrize("units", ["tokens", "words", "sentences", "turns"])
@every_method
def test_every_method_scores_a_conversation(tiny, method, units):
    messages = [
        {"role": "system", "content": "Be brief. Be kind."},
        {"role": "user", "content": "Is it Riga?"},
    ]
    question = ask(*tiny, messages, units=units, target="Yes", foil="No")
    check_result(attribute(tiny[0], question, method), question, method)


@every_method
def test_every_method_works_on_the_bundled_model(bundled, method):
    question = ask(*bundled, "Riga is in", target=" Latvia", foil=" Estonia")
    check_result(attribute(bundled[0], question, method), question, method)


@every_method
def test_every_method_works_in_bfloat16(method):
    model, tokenizer = tiny_llama()
    question = a_question((model.to(torch.bfloat16), tokenizer))
    check_result(attribute(model, question, method), question, method)


@every_method
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_works_on_every_variant_of_llama(method, variant):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = a_question((model, tokenizer))
    check_result(attribute(model, question, method), question, method)


@every_method
def test_a_prompt_of_one_token_has_one_score(tiny, method):
    question = ask(*tiny, "R")
    assert question.input_ids.shape == (1, 1)
    check_result(attribute(tiny[0], question, method), question, method)


@every_method
def test_the_foil_changes_every_method_that_looks_at_the_answer(tiny, method):
    alone = attribute(tiny[0], a_question(tiny, target="a"), method).scores
    against = attribute(tiny[0], a_question(tiny, target="a", foil="b"), method).scores
    looks = method not in ("attention", "attention_rollout", "random")
    assert torch.equal(alone, against) != looks


def test_the_score_of_a_foil_is_subtracted(tiny):
    """Gradients are linear: log p(a) - log p(b), though each of them has a normaliser."""

    def scores(**options):
        return attribute(tiny[0], a_question(tiny, **options), "gradient_x_input").scores

    same(scores(target="a", foil="b"), scores(target="a") - scores(target="b"))
    both = scores(target="ab", foil="cd")
    apart = scores(target="ab")[: len(PROMPT)] - scores(target="cd")[: len(PROMPT)]
    same(both, apart)


# --- what is explained, against forms written out by hand --------------------------------------


@every_shape
def test_the_objective_is_what_the_chain_rule_says(tiny, shape):
    model, question = tiny[0], a_question(tiny, **SHAPES[shape])
    same(objective(model, embed_prompt(model, question), question), by_hand.value(model, question))
    ids = question.input_ids[0].tolist()

    def branch(target):  # token by token, each under its own prefix
        total = 0.0
        for place, token in enumerate(target):
            logits = model(torch.tensor([[*ids, *target[:place]]])).logits[0, -1]
            logs = logits.log_softmax(-1) if question.objective == "log_probability" else logits
            total += logs[token].item()
        return total

    expected = branch(question.target) - (branch(question.foil) if question.foil else 0)
    assert by_hand.value(model, question).item() == pytest.approx(expected, abs=1e-4)


@every_shape
def test_gradients_are_those_of_the_chain_rule(tiny, shape):
    model, question = tiny[0], a_question(tiny, **SHAPES[shape])
    grad = by_hand.gradient(model, question)[0]
    seq = question.input_ids.shape[1]
    ours = objective_gradient(model, embed_prompt(model, question), question)
    near(ours[0], grad[:seq])
    squares = by_hand.per_unit(grad.pow(2).sum(dim=-1), question)
    near(attribute(model, question, "saliency").scores, squares.sqrt())
    products = (grad * by_hand.columns(model, question)[0]).sum(dim=-1)
    near(
        attribute(model, question, "gradient_x_input").scores, by_hand.per_unit(products, question)
    )


def near(scores, expected):
    """To 1e-5 of the largest."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 * max(largest, 1))


@every_shape
@pytest.mark.parametrize("replacement", ["mean", "eos", "zero", "neighbour", "remove"])
def test_occlusion_is_the_fall_without_each_unit(tiny, shape, replacement):
    model, question = tiny[0], a_question(tiny, **SHAPES[shape])
    result = attribute(model, question, "occlusion", replacement=replacement)
    near(result.scores, by_hand.falls(model, question, replacement))


@pytest.mark.parametrize("units, default", [("words", "mean"), ("sentences", "remove")])
def test_a_run_of_average_embeddings_does_not_stand_for_a_sentence(tiny, units, default):
    question = ask(*tiny, "It is. It was! Is it?", units=units, target="a")
    usual = attribute(tiny[0], question, "occlusion").scores
    for replacement in ("mean", "remove"):
        chosen = attribute(tiny[0], question, "occlusion", replacement=replacement).scores
        assert torch.equal(chosen, usual) == (replacement == default)
    assert len(question.units) == (9 if units == "words" else 3)


@pytest.mark.parametrize("shape", ["two tokens", "two texts", "an answer in words", "words"])
@pytest.mark.parametrize("replacement", ["mean", "remove"])
def test_shapley_values_of_units_are_the_average_over_all_orders(tiny, shape, replacement):
    from itertools import permutations

    model = tiny[0]
    question = ask(*tiny, "a b" if "words" in shape else "abc", **SHAPES[shape])
    count = len(question.units)
    value = {}
    for kept in range(2**count):
        gone = [unit for unit in range(count) if not kept >> unit & 1]
        value[kept] = by_hand.without(model, question, gone, replacement)
    total, orders = [0.0] * count, list(permutations(range(count)))
    for order in orders:
        there = 0
        for unit in order:
            total[unit] += value[there | 1 << unit] - value[there]
            there |= 1 << unit
    result = attribute(model, question, "shapley", replacement=replacement)
    same(result.scores, torch.tensor(total) / len(orders))
    assert result.gap < 1e-5 and result.errors.eq(0).all()


def test_twelve_passages_cost_twelve_rows(tiny):
    passages = [f"Passage {number} is about {'water ' * number}." for number in range(10, 22)]
    question = ask(*tiny, "\n".join(passages), sources=passages, target="a")
    result, _, rows = rows_run(tiny[0], lambda: attribute(tiny[0], question, "occlusion"))
    assert [unit.label.strip() for unit in question.units] == passages
    assert result.forwards == rows == 12 + 1


@pytest.mark.thorough
def test_a_positive_score_says_that_the_answer_is_less_probable_without_the_token(bundled):
    """On ten prompts of forty, each token: by asking the model again, without anything of ours."""
    model, tokenizer = bundled
    entries = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))
    assert len(entries) >= 40
    table = model.get_input_embeddings().weight
    texts = [entry if isinstance(entry, str) else entry["prompt"] for entry in entries]
    shortest = few(sorted(texts, key=len)[:40], 10)
    questions = [read_question(tokenizer, text, model=model) for text in shortest]
    signs = 0
    for question, results in attribute_all(model, questions, ["occlusion"]):
        rows = table[question.input_ids].repeat(len(question.labels) + 1, 1, 1)
        rows[range(1, len(rows)), range(len(rows) - 1)] = table.mean(dim=0)
        with torch.inference_mode():
            odds = (
                model(inputs_embeds=rows, logits_to_keep=1)
                .logits[:, -1]
                .softmax(-1)[:, question.target[0]]
            )
        assert question.probability == pytest.approx(odds[0].item(), rel=1e-3)
        scores = results["occlusion"].scores
        clear = (odds[1:] / odds[0] - 1).abs() > 1e-4
        assert torch.equal((scores > 0)[clear], (odds[1:] < odds[0])[clear])
        same(scores, (odds[0] / odds[1:]).log(), 1e-2)
        signs += int((scores < 0).sum())
    assert signs > len(shortest) // 4  # some tokens do push the answer away


# --- rows of a whole answer --------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("method", ["gradient_x_input", "relevance", "alti_logit", "occlusion"])
def test_rows_add_up_to_the_scores_of_the_sum(tiny, method, shape):
    question = a_question(tiny, **SHAPES[shape])
    result = attribute(tiny[0], question, method, each=True)
    alone = attribute(tiny[0], question, method)
    largest = float(result.each.abs().max())
    same(result.each.sum(dim=0), alone.scores, 1e-4 * max(1, largest))
    same(result.scores, alone.scores, 1e-4 * max(1, largest))
    assert (result.gap is None) == (alone.gap is None)
    assert result.gaps is None or len(result.gaps) == len(result.each)


# --- the model is left as it was found ---------------------------------------------------------


def state(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return SimpleNamespace(
        attention=model.config._attn_implementation,
        wants_grad=[weight.requires_grad for weight in model.parameters()],
        grads=[weight.grad for weight in model.parameters()],
        training=[module.training for module in model.modules()],
        hooks=hooks,
        bytes=[weight.sum().item() for weight in model.parameters()],
        head=id(model.get_output_embeddings()),
        registries=[
            dict(registry._global_mapping)
            for registry in (AttentionInterface, AttentionMaskInterface)
        ],
        torch=(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.get_rng_state().tolist(),
        ),
    )


def thaw(model, which):
    for index, weight in enumerate(model.parameters()):
        weight.requires_grad_(which == "thawed" or (which == "half thawed" and index % 2 == 0))
    return model


@every_method
@pytest.mark.parametrize("weights", ["frozen", "half thawed", "thawed"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_model_is_left_as_found(method, weights, training):
    model, tokenizer = tiny_llama()
    thaw(model, weights).train(training)
    question = a_question((model, tokenizer), target="ab", foil="cd")
    before = state(model)
    attribute(model, question, method, each=training)
    attribute(model, question, method, precision="bfloat16")
    assert state(model) == before
    assert before.grads == [None] * len(before.grads)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"random"}))
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_the_model_is_left_as_found_when_a_method_fails(method, precision):
    model, tokenizer = tiny_llama()
    question = a_question((thaw(model, "half thawed"), tokenizer))

    def out_of_memory(module, inputs):
        raise MemoryError("half way through the model")

    model.model.layers[1].register_forward_pre_hook(out_of_memory)
    before = state(model)
    with pytest.raises(MemoryError):
        attribute(model, question, method, precision=precision)
    assert state(model) == before


def test_the_model_is_as_found_between_two_questions_of_many():
    """Also for one who stops half way: nothing is undone only when a generator is collected."""
    model, tokenizer = tiny_llama()
    questions = [ask(model, tokenizer, text) for text in ("Riga is in", "Oslo", "Rome is")]
    before = state(model)
    stream = attribute_all(model, questions, ["saliency", "occlusion"], precision="bfloat16")
    for _, results in stream:
        assert state(model) == before and set(results) == {"saliency", "occlusion"}
        break
    else:
        pytest.fail("nothing came back")
    assert state(model) == before


@every_method
def test_scores_do_not_depend_on_whether_the_weights_are_frozen(tiny, method):
    model, tokenizer = tiny_llama()
    question = a_question((thaw(model, "thawed"), tokenizer))
    assert torch.equal(
        attribute(model, question, method).scores, attribute(tiny[0], question, method).scores
    )


@every_method
def test_no_activation_of_a_weight_is_kept_for_a_gradient(method):
    """Inside a method no weight asks for a gradient, so none is computed."""
    model, tokenizer = tiny_llama()
    question = a_question((thaw(model, "thawed"), tokenizer))
    asked = []
    model.register_forward_pre_hook(
        lambda module, inputs: asked.append([w.requires_grad for w in module.parameters()])
    )
    attribute(model, question, method)
    assert not any(flag for flags in asked for flag in flags)


def test_a_model_loaded_eager_stays_eager():
    model, tokenizer = tiny_llama()
    model.set_attn_implementation("eager")
    attribute(model, a_question((model, tokenizer)), "attention")
    assert model.config._attn_implementation == "eager"


# --- what a method costs -----------------------------------------------------------------------


@every_method
def test_the_counts_are_the_rows_that_were_run(tiny, method):
    question = a_question(tiny)
    result, with_gradient, without = rows_run(tiny[0], lambda: attribute(tiny[0], question, method))
    assert (result.evaluations, result.forwards) == (with_gradient, without)


@pytest.mark.parametrize("n_steps", [1, 7, 120])
def test_fixed_step_integrated_gradients_count_their_steps(tiny, n_steps):
    question = ask(*tiny, "a long prompt " * 8)  # several batches
    result, with_gradient, without = rows_run(
        tiny[0], lambda: fixed_step_integrated_gradients(tiny[0], question, n_steps=n_steps)
    )
    assert (result.evaluations, result.forwards) == (with_gradient, without) == (n_steps, 2)


@every_method
@pytest.mark.parametrize("shape", ["foil", "two tokens", "words"])
def test_the_counts_are_the_rows_that_were_run_for_any_question(tiny, method, shape):
    question = a_question(tiny, **SHAPES[shape])
    for each in (False, True):
        result, with_gradient, without = rows_run(
            tiny[0], lambda each=each: attribute(tiny[0], question, method, each=each)
        )
        assert (result.evaluations, result.forwards) == (with_gradient, without)


@every_method
@pytest.mark.parametrize("units, prompt", [("tokens", PROMPT), ("words", "one two three " * 3)])
def test_the_price_is_what_was_run(tiny, method, units, prompt):
    """Of integrated gradients it is the mean over real prompts, and no more than was allowed."""
    question = ask(*tiny, prompt, units=units, target="a", foil="b")
    size = len(question.units), question.input_ids.shape[1]
    options = METHODS[method].options(*size, BUDGET)
    _, gradients, forwards = rows_run(
        tiny[0], lambda: attribute(tiny[0], question, method, budget=BUDGET)
    )
    price = METHODS[method].price(*size, options)
    if method == "integrated_gradients":
        assert gradients <= options["max_evaluations"] and price.gradients > 0
    elif method == "shapley":  # orders may share a subset
        assert 0.8 * price.forwards <= forwards <= price.forwards
    else:
        assert (price.gradients, price.forwards) == (gradients, forwards)


@pytest.mark.parametrize(
    "method, options",
    [
        ("relevance", {"baseline": "zero"}),
        ("coalitions", {"rows": 81}),
        ("coalitions", {"keep": 0}),
        ("coalitions", {"keep": 1}),
        ("find_then_rank", {"rows": 60}),
        ("shapley", {"permutations": 4}),
        ("attention_rollout", {}),
    ],
)
def test_options_that_are_chosen_have_their_price(tiny, method, options):
    """Rows, and what part of each is run: the tokens that the first layer reads."""
    question = ask(*tiny, "ab" * 20, target="a", foil="b")
    tokens, read = question.input_ids.shape[1], []
    count = lambda layer, args: read.append(args[0].shape[:2].numel())  # noqa: E731
    with tiny[0].model.layers[0].register_forward_pre_hook(count):
        run = rows_run(tiny[0], lambda: attribute(tiny[0], question, method, **options))
    price = METHODS[method].price(tokens, tokens, options)
    assert run[1:] == (price.gradients, price.forwards)
    share = (sum(read) / tokens - price.gradients) / max(1, price.forwards)
    if options.get("keep") is None:  # where one unit goes or stays, much more or less is shared
        assert share == pytest.approx(price.share if price.forwards else 0, abs=0.12)


@pytest.mark.parametrize("method, more", [("shapley", 1), ("coalitions", 1), ("find_then_rank", 2)])
def test_few_units_are_priced_as_all_their_coalitions(method, more):
    assert METHODS[method].price(4, 4, {}).forwards == 2**4 - 1 + more


@pytest.mark.parametrize("budget, rows", [(BUDGET, 200), (2000, 80), (900, 40)])
def test_a_budget_sets_the_number_of_orders_of_shapley_values(tiny, budget, rows):
    question = a_question(tiny, foil="b")  # ten tokens
    result = attribute(tiny[0], question, "shapley", budget=budget)
    assert result.forwards <= min(rows, budget // 10) and result.forwards > rows / 3
    chosen = attribute(tiny[0], question, "shapley", budget=budget, permutations=4)
    assert chosen.forwards <= 4 * 9 + 3  # what is asked for by name goes before the budget


def test_a_method_that_a_budget_cannot_pay_is_refused_or_left_out(tiny):
    question = a_question(tiny, foil="b")
    with pytest.raises(InputError, match=r"budget of 300 .* too small for shapley"):
        attribute(tiny[0], question, "shapley", budget=300)
    ((_, results),) = attribute_all(tiny[0], [question], ["shapley", "saliency"], budget=300)
    assert set(results) == {"saliency"}


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_one_and_many_give_the_same_numbers_for_the_same_budget(tiny, budget):
    questions = [ask(*tiny, text, foil="b") for text in ("Riga is in", "Oslo", "one two three ")]
    every = list(attribute_all(tiny[0], questions, METHODS, budget=budget))
    for question, results in every:
        assert list(results) == list(METHODS)
        for name, result in results.items():
            alone = attribute(tiny[0], question, name, budget=budget, beside=METHODS)
            same(result.scores, alone.scores, 1e-4)
            assert (result.forwards, result.evaluations) == (alone.forwards, alone.evaluations)


def rows_in_a_report(names, units, tokens):
    """``{name: rows}`` priced for one report, a gradient as two, and those of its erasure test."""
    found = options_of({name: {} for name in names}, units, tokens, BUDGET)
    prices = {
        name: METHODS[name].price(units, tokens, options)
        for name, options in found.items()
        if options is not None
    }
    prices["erasure"] = erasure_price(units, tokens, len(found))
    return {name: 2 * p.gradients + p.share * p.forwards for name, p in prices.items()}


FEW = ["integrated_gradients", "occlusion", "coalitions", "random"]


@pytest.mark.parametrize(
    "names, units, tokens",
    [
        *[(METHODS, tokens, tokens) for tokens in (10, 30, 86, 500)],
        (METHODS, 12, 60),
        *[(FEW, tokens, tokens) for tokens in (10, 30, 500)],
    ],
)
def test_integrated_gradients_get_a_quarter_of_a_reports_rows(names, units, tokens):
    rows = rows_in_a_report(names, units, tokens)
    assert 0.24 < rows["integrated_gradients"] / sum(rows.values()) <= 0.25


def most_gradients(tokens, *names, **more):
    wanted = {name: {} for name in names} | more
    return options_of(wanted, tokens, tokens, BUDGET)["integrated_gradients"]["max_evaluations"]


def test_integrated_gradients_keep_the_budget_alone_and_their_first_look_anyway():
    alone = {length: most_gradients(length, "integrated_gradients") for length in (6, 30, 150)}
    assert alone == {6: 2000, 30: 1000, 150: 200}
    assert FIRST_EVALUATIONS < most_gradients(30, *METHODS) < 150
    assert most_gradients(4, *METHODS) == most_gradients(150, *METHODS) == FIRST_EVALUATIONS
    assert most_gradients(1500, *METHODS) == FIRST_EVALUATIONS  # of 20 that the budget allows
    chosen = {"integrated_gradients": {"max_evaluations": 500}}
    assert most_gradients(30, *METHODS, **chosen) == 500


def test_a_longer_foil_takes_no_gradients_from_a_report(tiny):
    """Its two texts cost twice as much a row, of every method and of the test by erasure alike."""
    spent = [
        attribute(
            tiny[0],
            ask(*tiny, "ab" * 10, target="a b c", foil=foil),
            "integrated_gradients",
            budget=BUDGET,
            beside=["coalitions", "random"],
            tolerance=1e-12,
        ).evaluations
        for foil in (None, "d e f")
    ]
    assert spent[1] > FIRST_EVALUATIONS and abs(spent[0] - spent[1]) <= 2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("units, tokens", [(1, 1), (2, 3), (10, 10), (10, 300)])
def test_an_option_that_is_left_out_is_priced_as_its_default(name, units, tokens):
    parameters = inspect.signature(METHODS[name].run).parameters.values()
    defaults = {
        each.name: each.default
        for each in parameters
        if each.default is not each.empty and each.default is not None
    }
    price = METHODS[name].price
    assert price(units, tokens, {}) == price(units, tokens, defaults)


def test_what_others_take_gives_integrated_gradients_their_part(monkeypatch):
    names = "integrated_gradients", "occlusion", "coalitions"
    few = most_gradients(30, *names)
    assert few < most_gradients(30, *names, "shapley") < most_gradients(30, *METHODS)
    more = most_gradients(30, *names, shapley={"permutations": 40})
    assert most_gradients(30, *names, "shapley") < more
    for name, price in [("theirs", Price(forwards=600)), ("unpaid", Price(gradients=600))]:
        options = (lambda u, t, b: None) if name == "unpaid" else (lambda u, t, b: {})
        record = Method(name, None, lambda u, t, o, price=price: price, options=options)
        monkeypatch.setitem(METHODS._found, name, record)
    orders = erasure_price(30, 30, 4).rows - erasure_price(30, 30, 3).rows
    theirs = most_gradients(30, *names, "theirs")
    assert theirs == pytest.approx(few + (600 + orders) / 3 / 2, abs=1)
    assert most_gradients(30, *METHODS) > most_gradients(30, *names, "theirs", "unpaid") >= theirs


def test_a_method_of_another_package_may_have_a_part_too(monkeypatch):
    record = Method(
        "theirs",
        None,
        lambda u, t, options: Price(gradients=options["gradients"]),
        options=lambda u, tokens, budget: {"gradients": budget // tokens},
        at_most=0.1,
    )
    monkeypatch.setitem(METHODS._found, "theirs", record)
    rows = rows_in_a_report(["theirs", "occlusion", "shapley"], 30, 30)
    assert 0.09 < rows["theirs"] / sum(rows.values()) <= 0.1
    assert rows_in_a_report(["theirs"], 30, 30)["theirs"] == 2 * (BUDGET // 30)


def test_integrated_gradients_stop_at_their_part_and_say_what_they_did_not_close(bundled):
    question = ask(*bundled, "The dog barked at the")  # which takes hundreds of gradients
    result = attribute(
        bundled[0], question, "integrated_gradients", budget=BUDGET, beside=["occlusion"]
    )
    assert result.evaluations == FIRST_EVALUATIONS and not result.closed
    (note,) = [note for note in result.notes if "did not close" in note]
    assert f"(gap {result.gap:.1%})" in note


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@with_and_without_foil
def test_the_gradient_agrees_with_finite_differences(variant, foil):
    """In float32, since Llama's RMSNorm computes in float32 whatever it is given."""
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = a_question((model, tokenizer), foil=foil)
    embeds = embed_prompt(model, question)
    grad = objective_gradient(model, embeds, question)
    step = 1e-2
    generator = torch.Generator().manual_seed(0)
    for position in range(embeds.shape[1]):
        along = torch.zeros_like(embeds)
        along[0, position] = torch.randn(embeds.shape[-1], generator=generator)
        along /= along.norm()
        with torch.no_grad():
            up, down = objective(
                model, torch.cat([embeds + step * along, embeds - step * along]), question
            )
        slope = (grad * along).sum()
        same((up - down) / (2 * step), slope, 1e-2)


def test_one_token_against_one_is_the_difference_of_their_logits(tiny):
    question = a_question(tiny, target="a", foil="b")
    logits = tiny[0](question.input_ids).logits[0, -1]
    value = objective(tiny[0], embed_prompt(tiny[0], question), question)
    same(value[0], logits[question.target[0]] - logits[question.foil[0]])
    for method in METHODS:  # the objective named is no other one here
        raw = attribute(tiny[0], question, method, objective="logit").scores
        assert torch.equal(raw, attribute(tiny[0], question, method).scores), method


def test_the_raw_logit_can_be_asked_for(tiny):
    question = a_question(tiny, target="a")
    raw = a_question(tiny, target="a", objective="logit")
    for method in ("gradient_x_input", "occlusion", "relevance", "alti_logit"):
        named = attribute(tiny[0], question, method, objective="logit").scores
        assert torch.equal(named, attribute(tiny[0], raw, method).scores)
        assert not torch.allclose(named, attribute(tiny[0], question, method).scores)


def captum_directly(model, question, start, **options):
    return (
        captum.attr.IntegratedGradients(lambda rows: objective(model, rows, question))
        .attribute(embed_prompt(model, question), baselines=start.clone(), **options)
        .sum(dim=-1)[0]
    )


@pytest.mark.parametrize("rule", ["gausslegendre", "riemann_trapezoid", "riemann_middle"])
def test_fixed_steps_are_captums(tiny, rule):
    model, question = tiny[0], a_question(tiny)
    direct = captum_directly(
        model, question, baseline_embeds(model, question), n_steps=50, method=rule
    )
    same(fixed_step_integrated_gradients(model, question, rule=rule).scores, direct)


@pytest.mark.parametrize(
    ("total", "moved", "gap"),
    [(5.0, 4.0, 0.25), (5.0, -4.0, 2.25), (0.75, 0.5, 0.25), (0.0, 0.0, 0.0), (3.0, 0.0, 3.0)],
)
def test_the_gap_never_divides_by_less_than_one_logit(total, moved, gap):
    assert completeness_gap(torch.tensor([total, 0.0]), torch.tensor(moved)) == pytest.approx(gap)


@pytest.mark.parametrize(
    "method", ["saliency", "gradient_x_input", "attention", "occlusion", "random"]
)
def test_a_method_that_does_not_promise_to_add_up_has_no_gap(tiny, method):
    assert attribute(tiny[0], a_question(tiny), method).gap is None


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_the_mean_of_the_last_rows_of_the_full_maps(variant):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    question = a_question((model, tokenizer))
    scores = attribute(model, question, "attention").scores
    model.set_attn_implementation("eager")
    maps = model(question.input_ids, output_attentions=True).attentions
    same(scores, torch.stack(maps)[:, 0, :, -1].mean(dim=(0, 1)), 1e-6)
    assert scores.sum() == pytest.approx(1, abs=1e-5)


def test_attention_does_not_depend_on_the_target(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, "Riga is in", target=" Latvia")
    other = ask(model, tokenizer, "Riga is in", target=" Estonia", foil=" Latvia")
    first, second = (attribute(model, q, "attention").scores for q in (question, other))
    assert torch.equal(first, second)
    assert first.sum() == pytest.approx(1, abs=1e-4)


def test_attention_rows_are_those_of_the_positions_that_read(tiny):
    model, question = tiny[0], a_question(tiny, target="abc")
    with asking(model, [question]) as asked:
        rows = torch.stack(attention_rows(asked))  # [layers, 1, heads, outputs, length]
    read = torch.cat([question.input_ids, torch.tensor([question.target[:-1]])], dim=1)
    eager, _ = tiny_llama()
    eager.set_attn_implementation("eager")
    maps = torch.stack(eager(read, output_attentions=True).attentions)
    same(rows, maps[:, :, :, -3:], 1e-6)
    every = attribute(model, question, "attention", each=True)
    same(every.each, maps[:, 0, :, -3:].mean(dim=(0, 1)), 1e-6)
    same(every.scores, every.each.mean(dim=0), 1e-6)


# --- replacing tokens, and the control ---------------------------------------------------------


def test_occlusion_finds_the_country_in_the_capital_question(bundled):
    model, tokenizer = bundled
    question = ask(
        model, tokenizer, "The capital city of Latvia is", target=" Riga", foil=" Tallinn"
    )
    scores = attribute(model, question, "occlusion").scores
    assert question.labels[scores.argmax()] == " Latvia"
    assert len(question.target) > 1 and len(question.foil) > 1


def test_random_repeats_with_its_seed_and_changes_with_another(tiny):
    question = a_question(tiny)
    state_before = torch.get_rng_state()
    first, again, other = (
        attribute(tiny[0], question, "random", seed=seed).scores for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state_before)


@every_method
def test_every_method_repeats_exactly(tiny, method):
    question = a_question(tiny)
    first, again = (attribute(tiny[0], question, method).scores for _ in range(2))
    assert torch.equal(first, again)


# --- baselines ---------------------------------------------------------------------------------


def test_baselines_are_the_mean_the_end_of_text_token_and_zero(tiny):
    model, tokenizer = tiny
    question = a_question(tiny)
    table = model.get_input_embeddings().weight
    embeds = embed_prompt(model, question)
    for name, row in {
        "mean": table.mean(dim=0),
        "eos": table[tokenizer.eos_token_id],
        "zero": torch.zeros(table.shape[1]),
    }.items():
        start = baseline_embeds(model, question, name)
        assert start.shape == embeds.shape
        same(start, row.expand_as(embeds), 1e-6)


def test_the_eos_baseline_takes_the_first_of_several_end_tokens():
    model, tokenizer = tiny_llama()
    question = a_question((model, tokenizer))
    one = baseline_embeds(model, question, "eos")
    model.config.eos_token_id = [tokenizer.eos_token_id, 0]  # as in Llama 3's configuration
    assert torch.equal(baseline_embeds(model, question, "eos"), one)


def test_a_replacement_can_be_a_tensor(tiny):
    question = a_question(tiny)
    mean = tiny[0].get_input_embeddings().weight.mean(dim=0)
    for given in (mean, mean.expand(len(PROMPT), -1), mean.expand(1, len(PROMPT), -1)):
        scores = attribute(tiny[0], question, "occlusion", replacement=given).scores
        same(scores, attribute(tiny[0], question, "occlusion").scores)
    with pytest.raises(InputError, match=r"\[7\] and what is read \[10, 32\]"):
        attribute(tiny[0], question, "occlusion", replacement=torch.zeros(7))


def test_at_its_own_baseline_no_token_moved_anything(tiny):
    question = a_question(tiny)
    itself = embed_prompt(tiny[0], question)
    for method, name in (("integrated_gradients", "baseline"), ("occlusion", "replacement")):
        result = attribute(tiny[0], question, method, **{name: itself})
        same(result.scores, torch.zeros_like(result.scores), 1e-5)


# --- bad input ---------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_the_known_ones(tiny):
    with pytest.raises(InputError) as error:
        attribute(tiny[0], a_question(tiny), "grad_cam")
    assert all(name in str(error.value) for name in ["grad_cam", *METHODS])


@pytest.mark.parametrize(
    "method, name, known",
    [
        ("integrated_gradients", "baseline", "mean eos zero"),
        ("occlusion", "replacement", "mean eos neighbour zero remove"),
        ("shapley", "replacement", "mean eos neighbour zero remove"),
    ],
)
def test_an_unknown_baseline_is_refused_with_the_known_ones(tiny, method, name, known):
    with pytest.raises(InputError) as error:
        attribute(tiny[0], a_question(tiny), method, **{name: "average"})
    assert all(word in str(error.value) for word in ("average", *known.split()))


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"random", "alti_logit"}))
def test_numbers_that_are_not_finite_are_an_error(method):
    model, tokenizer = tiny_llama()
    model.lm_head.weight.fill_(3e38)  # finite, and every logit overflows
    question = ask(model, tokenizer, "Riga", target="a")
    with pytest.raises(InputError, match=f"{method} are not finite"):
        attribute(model, question, method)


def test_an_unknown_option_is_refused_before_anything_is_run(tiny):
    def refused():
        with pytest.raises(InputError, match=r"occlusion cannot run: .*'baseline'"):
            attribute(tiny[0], a_question(tiny, target="a", foil="b"), "occlusion", baseline="mean")
        with pytest.raises(InputError, match="objective 'odds': use log_probability or logit"):
            attribute(tiny[0], question, "saliency", objective="odds")

    question = a_question(tiny)
    ask_rows = rows_run(tiny[0], lambda: a_question(tiny, target="a", foil="b"))[2]
    assert rows_run(tiny[0], refused)[1:] == (0, ask_rows)


def test_an_error_of_a_method_itself_is_not_taken_for_a_wrong_option(tiny, monkeypatch):
    def run(asked):
        raise TypeError("model() got an unexpected keyword argument 'inputs_embeds'")

    method = Method("odd", run, METHODS["saliency"].price)
    monkeypatch.setitem(METHODS._found, "odd", method)
    with pytest.raises(TypeError, match="inputs_embeds"):
        attribute(tiny[0], a_question(tiny), "odd")


def test_a_model_whose_attention_cannot_be_watched_is_refused(linear, tiny):
    question = ask(linear, tiny[1], PROMPT, target="a")
    for method in ("attention", "attention_rollout"):
        with pytest.raises(InputError, match=f"{method} cannot run. .*LinearCausalModel"):
            attribute(linear, question, method)


# --- a method of one's own ---------------------------------------------------------------------


def length_times_slope(asked, factor=1.0):
    """The norm of each embedding, signed by nothing: a method in a few lines."""
    embeds = asked.embeds[:, :1, : asked.columns].norm(dim=-1)  # [questions, 1, columns]
    return attributions(asked, factor * embeds.expand(-1, asked.outs, -1), signed=False)


def variant_first(asked):
    """Looks at a variant before it looks at the prompt."""
    rows = asked.embeds.clone()
    rows[:, :, 0] = 0
    changed, whole = asked.values(rows), asked.values()
    scores = (whole - changed)[..., None].expand(-1, -1, asked.columns)
    return attributions(asked, scores, forwards=2)


def test_a_method_is_a_record_that_anybody_can_add(tiny, monkeypatch):
    own = Method(
        "own",
        length_times_slope,
        METHODS["random"].price,
        signed=False,
        options=lambda units, tokens, budget: {"factor": float(units)},
    )
    monkeypatch.setitem(METHODS._found, "own", own)
    question = a_question(tiny, units="words")
    lengths = embed_prompt(tiny[0], question)[0].norm(dim=-1)
    result = attribute(tiny[0], question, "own")
    near(result.scores, by_hand.per_unit(lengths, question))
    assert result.method == "own" and not result.signed
    near(attribute(tiny[0], question, "own", budget=BUDGET).scores, 3 * result.scores)
    near(attribute(tiny[0], question, "own", budget=BUDGET, factor=2.0).scores, 2 * result.scores)
    ((_, results),) = attribute_all(tiny[0], [question], ["own", "saliency"])
    assert list(results) == ["own", "saliency"]


@pytest.mark.parametrize("entry", [{}, {"foil": "b"}, {"target": "ab"}], ids=str)
def test_a_variant_that_is_run_first_is_not_taken_for_the_prompt(tiny, monkeypatch, entry):
    monkeypatch.setitem(
        METHODS._found, "odd", Method("odd", variant_first, METHODS["random"].price)
    )
    model, tokenizer = tiny
    question = read_question(tokenizer, PROMPT, model=model, **entry)
    alone = ask(model, tokenizer, PROMPT, **entry)
    ((found, results),) = attribute_all(model, [question], ["odd"])
    assert (found.target, found.top) == (alone.target, alone.top)
    assert found.probability == pytest.approx(alone.probability, rel=1e-4)
    rows = by_hand.columns(model, alone)
    rows[:, 0] = 0
    expected = by_hand.value(model, alone) - by_hand.value(model, alone, rows)
    same(results["odd"].scores[0], expected[0])
