"""Attributions against answers known some other way: by hand, by Captum, by finite differences."""

from types import SimpleNamespace

import captum.attr
import pytest
import torch
from linear_model import LinearCausalModel
from llama3_rope import LLAMA3_ROPE
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, tiny_llama
from helpers.attribution import (
    baseline_embeds,
    completeness_gap,
    embed_prompt,
    fixed_step_integrated_gradients,
    last_attention_rows,
    objective,
    objective_gradient,
)

PROMPT = "Riga is in"
VARIANTS = {
    "one key-value head": {"key_value_heads": 1},
    "two key-value heads": {"key_value_heads": 2},
    "four key-value heads": {"key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}

every_method = pytest.mark.parametrize("method", METHODS)
with_and_without_foil = pytest.mark.parametrize("foil", [None, "b"], ids=["no foil", "foil"])


@pytest.fixture(scope="module")
def linear(tiny):
    return LinearCausalModel(tiny[1])


def a_question(tiny, **options):
    return ask(*tiny, PROMPT, **options)


def same(scores, expected, tolerance=1e-4):
    torch.testing.assert_close(scores, expected, rtol=tolerance, atol=tolerance)


# --- a model on which the right answer is known ------------------------------------------------


@with_and_without_foil
@pytest.mark.parametrize(
    "method", ["gradient_x_input", "integrated_gradients", "occlusion", "shapley"]
)
def test_signed_methods_are_exact_on_a_linear_model(linear, tiny, method, foil):
    question = ask(linear, tiny[1], PROMPT, target="a", foil=foil)
    known = linear.known_scores(question)
    assert known.abs().min() < known.abs().max()  # the answer is not a constant
    same(attribute(linear, question, method).scores, known, 1e-5)


@with_and_without_foil
def test_saliency_is_the_norm_of_the_known_gradient(linear, tiny, foil):
    question = ask(linear, tiny[1], PROMPT, target="a", foil=foil)
    same(
        attribute(linear, question, "saliency").scores, linear.known_gradient(question).norm(dim=1)
    )


@pytest.mark.parametrize("baseline", ["mean", "zero", "eos"])
def test_integrated_gradients_have_no_gap_on_a_linear_model(linear, tiny, baseline):
    question = ask(linear, tiny[1], PROMPT, target="a")
    assert attribute(linear, question, "integrated_gradients", baseline=baseline).gap < 1e-5


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion", "shapley"])
def test_scores_are_relative_to_the_baseline(linear, tiny, method):
    question = ask(linear, tiny[1], PROMPT, target="a")
    from_eos = linear.embed(question.input_ids[0]) - linear.embed.weight[tiny[1].eos_token_id]
    known = (linear.known_gradient(question) * from_eos).sum(dim=1)
    same(attribute(linear, question, method, baseline="eos").scores, known, 1e-5)


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
    assert result.scores.shape == (question.input_ids.shape[1],)
    assert result.scores.dtype == torch.float32
    assert result.scores.device.type == "cpu"
    assert not result.scores.requires_grad
    assert result.scores.isfinite().all()
    assert result.signed or (result.scores >= 0).all()
    assert result.gap is None or result.gap >= 0
    assert result.method == method
    assert result.seconds > 0


@every_method
@pytest.mark.parametrize("options", [{}, {"foil": "b"}, {"chat": True}], ids=str)
def test_every_method_scores_each_token_with_one_finite_number(tiny, method, options):
    question = a_question(tiny, **options)
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
    def scores(**options):
        return attribute(tiny[0], a_question(tiny, **options), "gradient_x_input").scores

    same(scores(target="a", foil="b"), scores(target="a") - scores(target="b"))


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
    question = a_question((model, tokenizer))
    before = state(model)
    attribute(model, question, method)
    assert state(model) == before
    assert before.grads == [None] * len(before.grads)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"random"}))
def test_the_model_is_left_as_found_when_a_method_fails(method):
    model, tokenizer = tiny_llama()
    question = a_question((thaw(model, "half thawed"), tokenizer))

    def out_of_memory(module, inputs):
        raise MemoryError("half way through the model")

    model.model.layers[1].register_forward_pre_hook(out_of_memory)
    before = state(model)
    with pytest.raises(MemoryError):
        attribute(model, question, method)
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
@with_and_without_foil
def test_no_logit_is_computed_that_is_not_asked_for(tiny, method, foil):
    model, question = tiny[0], a_question(tiny, foil=foil)
    shapes = []
    handle = model.register_forward_hook(lambda m, i, out: shapes.append(out.logits.shape[1:]))
    attribute(model, question, method)
    handle.remove()
    assert set(shapes) <= {(1, 1 if foil is None else 2)}
    assert shapes or method == "random"


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


def test_the_objective_is_the_logit_less_the_foils(tiny):
    question = a_question(tiny, target="a", foil="b")
    logits = tiny[0](question.input_ids).logits[0, -1]
    value = objective(tiny[0], embed_prompt(tiny[0], question), question)
    same(value[0], logits[question.target] - logits[question.foil])


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


def test_last_attention_rows_has_a_row_for_every_layer_and_head(bundled):
    model, tokenizer = bundled
    rows = last_attention_rows(model, ask(model, tokenizer, "Riga is in", target=" Latvia"))
    config = model.config
    assert rows.shape == (config.num_hidden_layers, config.num_attention_heads, 4)
    same(rows.sum(dim=-1), torch.ones(rows.shape[:2]))


# --- replacing tokens, and the control ---------------------------------------------------------


def test_occlusion_is_the_fall_of_the_logit_token_by_token(tiny):
    model = tiny[0]
    question = a_question(tiny, target="a")
    embeds, blank = embed_prompt(model, question), model.get_input_embeddings().weight.mean(dim=0)
    whole = model(inputs_embeds=embeds).logits[0, -1, question.target]
    falls = []
    for position in range(embeds.shape[1]):
        without = embeds.clone()
        without[0, position] = blank
        falls.append(whole - model(inputs_embeds=without).logits[0, -1, question.target])
    same(attribute(model, question, "occlusion").scores, torch.stack(falls))


def test_occlusion_finds_the_country_in_the_capital_question(bundled):
    model, tokenizer = bundled
    question = ask(model, tokenizer, "The capital city of Latvia is", target=" Rig", foil=" Tall")
    scores = attribute(model, question, "occlusion").scores
    assert question.labels[scores.argmax()] == " Latvia"


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


def test_a_baseline_can_be_a_tensor(tiny):
    question = a_question(tiny)
    mean = tiny[0].get_input_embeddings().weight.mean(dim=0)
    given = attribute(tiny[0], question, "occlusion", baseline=mean).scores
    same(given, attribute(tiny[0], question, "occlusion").scores)


def test_at_its_own_baseline_no_token_moved_anything(tiny):
    question = a_question(tiny)
    itself = embed_prompt(tiny[0], question)
    for method in ("integrated_gradients", "occlusion"):
        result = attribute(tiny[0], question, method, baseline=itself)
        same(result.scores, torch.zeros_like(result.scores), 1e-5)


# --- bad input ---------------------------------------------------------------------------------


def test_an_unknown_method_is_refused_with_the_known_ones(tiny):
    with pytest.raises(InputError) as error:
        attribute(tiny[0], a_question(tiny), "grad_cam")
    assert all(name in str(error.value) for name in ["grad_cam", *METHODS])


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_an_unknown_baseline_is_refused_with_the_known_ones(tiny, method):
    with pytest.raises(InputError) as error:
        attribute(tiny[0], a_question(tiny), method, baseline="average")
    assert all(name in str(error.value) for name in ("average", "mean", "eos", "zero"))
