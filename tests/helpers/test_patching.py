"""Activation patching against a slow version with one hook and one row, and against identities."""

from dataclasses import replace

import by_hand
import pytest
import torch
from llama3_rope import LLAMA3_ROPE

from helpers import InputError, ask, tiny_llama
from helpers.attribution import embed_prompt, objective
from helpers.patching import causal_scores, first_difference, patch_positions

CLEAN, CORRUPTED = "Riga is in", "Rome is on"  # bytes 1 to 3 and 8 differ
VARIANTS = {
    "one key-value head": {"key_value_heads": 1},
    "four key-value heads": {"key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
}
both_directions = pytest.mark.parametrize("direction", ["restore", "destroy"])


def pair(tiny, clean=CLEAN, corrupted=CORRUPTED, target="a", foil="b"):
    return [ask(*tiny, prompt, target=target, foil=foil) for prompt in (clean, corrupted)]


SHAPES = {
    "foil": {"target": "a", "foil": "b"},
    "no foil": {"target": "a"},
    "two tokens": {"target": "ab"},
    "a longer target": {"target": "abc", "foil": "d"},
    "a shared beginning": {"target": "abc", "foil": "abd"},
    "words": {"target": "ab", "units": "words"},
    "raw logit": {"target": "a", "objective": "logit"},
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def pair_of(tiny, shape):
    return [ask(*tiny, prompt, **SHAPES[shape]) for prompt in (CLEAN, CORRUPTED)]


def hidden_states(model, question):
    """The residual stream entering every layer and the final norm: list of [1, seq, dim]."""
    seen = []
    modules = [*model.model.layers, model.model.norm]
    hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for m in modules]
    with torch.no_grad():
        by_hand.value(model, question)
    for hook in hooks:
        hook.remove()
    return seen[: len(modules)]


def slow(model, giver, receiver, depth, positions):
    """The receiver's objective with the giver's states at some positions: one row, one hook."""
    states = hidden_states(model, giver)[depth]

    def put(module, args):
        changed = args[0].clone()
        changed[:, positions] = states[:, positions]  # of the prompt, in each branch
        return (changed, *args[1:])

    module = [*model.model.layers, model.model.norm][depth]
    hook = module.register_forward_pre_hook(put)
    with torch.no_grad():
        value = by_hand.value(model, receiver)
    hook.remove()
    return value.item()


def slow_effects(model, clean, corrupted, direction):
    giver, receiver = (clean, corrupted) if direction == "restore" else (corrupted, clean)
    given, received = (slow(model, q, q, 0, []) for q in (giver, receiver))
    depths, seq = range(len(model.model.layers) + 1), clean.input_ids.shape[1]
    values = [[slow(model, giver, receiver, depth, [p]) for p in range(seq)] for depth in depths]
    return (torch.tensor(values) - received) / (given - received)


def same(effects, expected, tolerance=1e-4):
    torch.testing.assert_close(effects, expected, rtol=tolerance, atol=tolerance)


# --- against one hook and one row at a time ----------------------------------------------------


@both_directions
@every_shape
def test_effects_are_those_of_one_hook_at_a_time(tiny, direction, shape):
    questions = pair_of(tiny, shape)
    found = patch_positions(tiny[0], *questions, direction=direction)
    same(found.effects, slow_effects(tiny[0], *questions, direction))
    assert found.effects.shape == (3, len(CLEAN))  # of the prompt, whatever follows
    assert found.effects[1, 1:].abs().min() > 1e-4  # not zero by chance


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_effects_hold_for_other_architectures(variant):
    tiny = tiny_llama(**variant)
    questions = pair(tiny)
    effects = patch_positions(tiny[0], *questions).effects
    same(effects, slow_effects(tiny[0], *questions, "restore"))


@pytest.mark.parametrize("start", ["", "A long beginning that both prompts share. "])
def test_a_shared_beginning_changes_nothing(tiny, start):
    questions = pair(tiny, start + "x" + CLEAN, start + "x" + CORRUPTED)
    assert first_difference(*questions) == len(start) + 2
    effects = patch_positions(tiny[0], *questions).effects
    same(effects, slow_effects(tiny[0], *questions, "restore"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_effects_do_not_depend_on_the_attention_implementation(attention):
    tiny = tiny_llama()
    questions = pair(tiny)
    expected = slow_effects(tiny[0], *questions, "restore")
    tiny[0].set_attn_implementation(attention)
    same(patch_positions(tiny[0], *questions).effects, expected)


def test_small_batches_give_the_same_effects(tiny, monkeypatch):
    questions = pair(tiny)
    whole = patch_positions(tiny[0], *questions)
    monkeypatch.setattr("helpers.attribution.engine.token_budget", lambda model: 1)
    by_row = patch_positions(tiny[0], *questions)
    same(by_row.effects, whole.effects)
    assert by_row.forwards == whole.forwards


def test_half_precision_is_near_full_precision():
    tiny = tiny_llama()
    questions = pair(tiny)
    full = patch_positions(tiny[0], *questions).effects
    half = patch_positions(tiny[0].to(torch.bfloat16), *questions).effects
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.1


# --- identities --------------------------------------------------------------------------------


@both_directions
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_all_positions_of_a_depth_are_the_whole_run_and_none_is_nothing(tiny, direction, depth):
    clean, corrupted = pair(tiny)
    found = patch_positions(tiny[0], clean, corrupted, direction=direction)
    giver, receiver = (clean, corrupted) if direction == "restore" else (corrupted, clean)
    given, received = (
        (found.clean, found.corrupted) if direction == "restore" else (found.corrupted, found.clean)
    )
    everywhere = list(range(len(CLEAN)))
    assert slow(tiny[0], giver, receiver, depth, everywhere) == pytest.approx(given, abs=1e-4)
    assert slow(tiny[0], giver, receiver, depth, []) == pytest.approx(received, abs=1e-4)


@both_directions
def test_the_only_position_that_differs_carries_all_of_the_embeddings_effect(tiny, direction):
    found = patch_positions(*tiny[:1], *pair(tiny, "Riga", "Roga"), direction=direction)
    same(found.effects[0], torch.tensor([0.0, 1, 0, 0]))


@both_directions
def test_after_the_last_layer_the_last_position_is_everything(tiny, direction):
    effects = patch_positions(tiny[0], *pair(tiny), direction=direction).effects
    same(effects[-1], torch.eye(len(CLEAN))[-1])


def test_positions_before_the_first_difference_have_no_effect(tiny):
    questions = pair(tiny)
    assert (patch_positions(tiny[0], *questions).effects[:, 0] == 0).all()
    assert slow_effects(tiny[0], *questions, "restore")[:, 0].abs().max() < 1e-5


def test_the_first_row_replaces_the_embedding(tiny):
    model = tiny[0]
    clean, corrupted = pair(tiny)
    found = patch_positions(model, clean, corrupted)
    given, received = embed_prompt(model, clean), embed_prompt(model, corrupted)
    rows = received.repeat(len(CLEAN), 1, 1)
    rows[range(len(CLEAN)), range(len(CLEAN))] = given[0]
    expected = (objective(model, rows, clean) - found.corrupted) / (found.clean - found.corrupted)
    same(found.effects[0], expected)


def test_the_two_objectives_are_those_of_the_two_prompts(tiny):
    clean, corrupted = pair(tiny)
    for direction in ("restore", "destroy"):
        found = patch_positions(tiny[0], clean, corrupted, direction=direction)
        for value, question in ((found.clean, clean), (found.corrupted, corrupted)):
            expected = objective(tiny[0], embed_prompt(tiny[0], question), question)
            assert value == pytest.approx(expected.item(), abs=1e-5)


def test_destroying_is_restoring_with_the_prompts_exchanged(tiny):
    clean, corrupted = pair(tiny)
    destroyed = patch_positions(tiny[0], clean, corrupted, direction="destroy").effects
    same(destroyed, patch_positions(tiny[0], corrupted, clean).effects)


# --- what is run, and what is refused ----------------------------------------------------------


def test_only_what_was_asked_for_is_run(tiny):
    questions = pair(tiny)
    whole = patch_positions(tiny[0], *questions)
    part = patch_positions(tiny[0], *questions, depths=[2, 1], positions=[9, 0, 4])
    asked = torch.zeros(3, len(CLEAN), dtype=torch.bool)
    asked[1:, [0, 4, 9]] = True
    same(part.effects[asked], whole.effects[asked])
    assert part.effects[~asked].isnan().all()
    # two runs and, of what was asked, neither what is the same in both nor what nothing reads
    assert (whole.forwards, part.forwards) == (2 + 4 + 9 + 1, 2 + 2 + 1)


def test_a_position_that_is_shared_needs_no_row(tiny):
    assert patch_positions(tiny[0], *pair(tiny), positions=[0]).forwards == 2


def test_the_score_of_a_position_is_its_mean_before_the_last_depth():
    effects = torch.tensor([[0.0, 1, 0], [0, torch.nan, 0.25], [0, 0, 1]])
    same(causal_scores(effects), torch.tensor([0, 1, 0.125]))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: replace(c, input_ids=c.input_ids[:, 1:]), "10 tokens .* 9"),
        (lambda c: replace(c, target=(5,)), "target and foil"),
        (lambda c: replace(c, foil=None), "target and foil"),
    ],
)
def test_a_pair_that_cannot_be_patched_is_refused(tiny, change, message):
    clean, corrupted = pair(tiny)
    with pytest.raises(InputError, match=message):
        patch_positions(tiny[0], clean, change(corrupted))


@pytest.mark.parametrize(
    "texts", [{"target": "ab", "foil": "cd"}, {"target": "axy", "foil": "abc"}]
)
def test_target_and_foil_in_two_texts_are_refused(tiny, texts):
    questions = [ask(*tiny, prompt, **texts) for prompt in (CLEAN, CORRUPTED)]
    hooks = [len(module._forward_pre_hooks) for module in tiny[0].modules()]
    with pytest.raises(InputError, match="reads one text"):
        patch_positions(tiny[0], *questions)
    assert [len(module._forward_pre_hooks) for module in tiny[0].modules()] == hooks


@pytest.mark.parametrize("positions", [[], [10], [-1, 2]])
def test_positions_that_are_not_there_are_refused(tiny, positions):
    with pytest.raises(InputError, match="Choose at least one position, from 0 to 9"):
        patch_positions(tiny[0], *pair(tiny), positions=positions)


def test_a_prompt_is_not_its_own_counterfactual(tiny):
    clean, _ = pair(tiny)
    with pytest.raises(InputError, match="the same"):
        patch_positions(tiny[0], clean, clean)


def test_a_pair_with_one_answer_has_nothing_to_explain(tiny, monkeypatch):
    monkeypatch.setattr("helpers.patching.LEAST_DIFFERENCE", 100)
    with pytest.raises(InputError, match="nothing to explain"):
        patch_positions(tiny[0], *pair(tiny))


@pytest.mark.parametrize(
    "options", [{"direction": "both"}, {"depths": [3]}, {"positions": [-1]}, {"depths": []}]
)
def test_unknown_choices_are_refused(tiny, options):
    with pytest.raises(InputError):
        patch_positions(tiny[0], *pair(tiny), **options)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails, monkeypatch):
    tiny = tiny_llama()
    model = tiny[0].requires_grad_(True)
    questions = pair(tiny, "Riga", "Tiga")  # no shared beginning: what fails is a patched run
    before = objective(model, embed_prompt(model, questions[0]), questions[0])
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    head = model.lm_head
    if fails:

        def fail(*args, **options):
            raise ZeroDivisionError

        monkeypatch.setattr(type(model.model.layers[1]), "forward", fail)
        with pytest.raises(ZeroDivisionError):
            patch_positions(model, *questions)
        monkeypatch.undo()
    else:
        patch_positions(model, *questions)
    assert model.lm_head is head and all(weight.requires_grad for weight in model.parameters())
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert set(vars(module)) == attributes[name]
    assert torch.equal(objective(model, embed_prompt(model, questions[0]), questions[0]), before)


# --- meaning -----------------------------------------------------------------------------------


def test_the_country_causes_the_capital_and_hands_it_to_the_last_position(bundled):
    prompts = [f"The capital city of {country} is" for country in ("Latvia", "Estonia")]
    clean, corrupted = (ask(*bundled, p, target=" Rig", foil=" Tall") for p in prompts)
    layers = len(bundled[0].model.layers)
    found = patch_positions(*bundled[:1], clean, corrupted, depths=[0, layers // 2, layers - 1])
    assert found.clean > 1 and found.corrupted < -1  # the answer really flips
    same(found.effects[[0, layers // 2, layers - 1], 4], torch.tensor([1.0, 1, 0]), 0.1)
    same(found.effects[[0, layers // 2, layers - 1], 5], torch.tensor([0.0, 0, 1]), 0.1)
