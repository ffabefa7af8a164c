"""Shapley values, rollout and ALTI-Logit against their definitions, written out slowly."""

from itertools import permutations

import by_hand
import pytest
import torch
from linear_model import LinearCausalModel

from helpers import InputError, ask, attribute, tiny_llama
from helpers.attribution import METHODS, baseline_embeds, embed_prompt, objective
from helpers.attribution.decomposition import _shares
from helpers.attribution.engine import attending, attention_weights, sdpa

PROMPT = "Riga is in"  # ten tokens of the toy's byte tokenizer


def same(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# --- Shapley values ----------------------------------------------------------------------------


def shapley_of_all_orders(model, question, baseline="mean"):
    """The definition: every order of adding the tokens, each token's gain averaged."""
    embeds = embed_prompt(model, question)
    blank = baseline_embeds(model, question, baseline)
    seq = embeds.shape[1]
    total = torch.zeros(seq)
    orders = list(permutations(range(seq)))
    with torch.no_grad():
        for order in orders:
            rows = [blank]
            for position in order:
                row = rows[-1].clone()
                row[0, position] = embeds[0, position]
                rows.append(row)
            values = objective(model, torch.cat(rows), question)
            total[list(order)] += values.diff()
    return total / len(orders)


@pytest.mark.parametrize("foil", [None, "b"])
def test_exact_shapley_values_average_over_every_order(tiny, foil):
    question = ask(*tiny, "Riga", foil=foil)
    result = attribute(tiny[0], question, "shapley")
    same(result.scores, shapley_of_all_orders(tiny[0], question))
    assert result.errors.eq(0).all() and result.forwards == 2**4


def test_sampled_shapley_values_are_within_their_errors_of_the_exact_ones(tiny):
    question = ask(*tiny, "Riga is")  # seven tokens
    exact = attribute(tiny[0], question, "shapley", permutations=40)
    sampled = attribute(tiny[0], question, "shapley", permutations=20, seed=3)
    assert exact.errors.eq(0).all() and sampled.errors.gt(0).all()
    off = (sampled.scores - exact.scores).abs() / sampled.errors
    assert off.median() < 2 and off.max() < 5


def test_errors_shrink_as_orders_are_added(tiny):
    question = ask(*tiny, PROMPT)
    few, many = (
        attribute(tiny[0], question, "shapley", permutations=n).errors.mean() for n in (10, 90)
    )
    assert many < few / 2  # three times, but for chance


@pytest.mark.parametrize("permutations", [4, 20])
def test_shapley_values_add_up_to_what_the_prompt_gained(tiny, permutations):
    question = ask(*tiny, PROMPT, foil="b")
    result = attribute(tiny[0], question, "shapley", permutations=permutations)
    ends = torch.cat([baseline_embeds(tiny[0], question), embed_prompt(tiny[0], question)])
    start, end = by_hand.value(tiny[0], question, ends)
    same(result.scores.sum(), end - start)
    assert result.gap < 1e-4 and result.closed


def test_two_equal_tokens_have_equal_shapley_values(tiny):
    """Symmetry, on a linear model whose weights are the same at all positions."""
    linear = LinearCausalModel(tiny[1])
    linear.weight.data[1] = linear.weight.data[0]
    question = ask(linear, tiny[1], "aab", target="c", foil="d")
    scores = attribute(linear, question, "shapley").scores
    same(scores[0], scores[1], 1e-6)


@pytest.mark.parametrize("permutations", [0, 2, 7])
def test_a_number_of_orders_that_makes_no_two_pairs_is_refused(tiny, permutations):
    with pytest.raises(InputError, match=f"even number of orders from 4, not {permutations}"):
        attribute(tiny[0], ask(*tiny, PROMPT), "shapley", permutations=permutations)


# --- attention, rolled out ---------------------------------------------------------------------


def eager_maps(model, question):
    """[layers, heads, seq, seq], as transformers returns them."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(question.input_ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.cat(maps)


@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_rollout_is_the_product_of_the_layers_mixed_with_themselves(sink, key_value_heads):
    model, tokenizer = tiny_llama(key_value_heads=key_value_heads)
    question = ask(model, tokenizer, PROMPT)
    maps = eager_maps(model, question).mean(dim=1)
    if not sink:
        maps[:, 1:, 0] = 0
        maps = maps / maps.sum(dim=-1, keepdim=True)
    flow = torch.eye(maps.shape[-1])
    for layer in maps:
        flow = (layer + torch.eye(len(layer))) / 2 @ flow
    result = attribute(model, question, "attention_rollout", sink=sink)
    same(result.scores, flow[-1], 1e-6)
    assert result.scores.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_weights_are_those_that_transformers_returns(tiny):
    model, question = tiny[0], ask(*tiny, PROMPT)
    found = []

    def keep(module, query, key, value, mask, scaling=None, **options):
        found.append(attention_weights(query, key, mask, scaling))
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)

    with torch.no_grad(), attending(model, keep):
        model(question.input_ids)
    same(torch.cat(found), eager_maps(model, question), 1e-6)


# --- ALTI-Logit --------------------------------------------------------------------------------


def alti_logit_slowly(model, question):
    """The paper's sums with a loop for each head and position, from transformers' own maps."""
    maps = eager_maps(model, question)
    config, layers = model.config, model.model.layers
    width = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    seen = {"states": [], "middle": [], "fed": []}
    hooks = [model.model.norm.register_forward_pre_hook(lambda m, a: seen.update(last=a[0][0, -1]))]
    for layer in layers:
        hooks.append(
            layer.register_forward_pre_hook(lambda m, a: seen["states"].append(a[0][0].clone()))
        )
        hooks.append(
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda m, a: seen["middle"].append(a[0][0].clone())
            )
        )
        hooks.append(layer.mlp.register_forward_hook(lambda m, a, o: seen["fed"].append(o[0, -1])))
    with torch.no_grad():
        logits = model(question.input_ids).logits[0, -1]
    for hook in hooks:
        hook.remove()
    (target,) = question.target
    odds = logits.softmax(-1) if question.objective == "log_probability" else 0 * logits
    value = logits[target] - odds @ logits
    rows = model.get_output_embeddings().weight
    unembed = rows[target] - odds @ rows
    rms = (seen["last"].pow(2).mean() + config.rms_norm_eps).sqrt()
    direction = unembed * model.model.norm.weight / rms
    seq = maps.shape[-1]
    mixed = torch.eye(seq)
    scores = mixed[-1] * (seen["states"][0][-1] @ direction)
    for number, layer in enumerate(layers):
        states = seen["states"][number]
        values = layer.self_attn.v_proj(layer.input_layernorm(states))
        moved = torch.zeros(seq, seq, config.hidden_size)  # [to, from, dim]
        for head in range(config.num_attention_heads):
            kv = head // group
            out = layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width]
            for to in range(seq):
                for origin in range(to + 1):
                    vector = out @ values[origin, kv * width : (kv + 1) * width]
                    moved[to, origin] += maps[number, head, to, origin] * vector
        scores = scores + (moved[-1] @ direction) @ mixed
        share = torch.zeros(seq, seq)
        for to in range(seq):
            total = seen["middle"][number][to]  # after attention, as the model itself had it
            for origin in range(to + 1):
                part = moved[to, origin] + (states[to] if origin == to else 0)
                share[to, origin] = max(0, total.abs().sum() - (total - part).abs().sum())
            share[to] /= share[to].sum()
        mixed = share @ mixed
        scores = scores + mixed[-1] * (seen["fed"][number] @ direction)
    return scores.detach(), value.detach()


@pytest.mark.parametrize("objective", ["logit", "log_probability"])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_alti_logit_is_the_papers_sum_and_adds_up(key_value_heads, objective):
    """To the logit, or to how far it is above the mean logit that the model expects."""
    model, tokenizer = tiny_llama(key_value_heads=key_value_heads)
    question = ask(model, tokenizer, "Riga", target="a", objective=objective)
    expected, logit = alti_logit_slowly(model, question)
    result = attribute(model, question, "alti_logit")
    same(result.scores, expected, 1e-5)
    same(result.scores.sum(), logit)
    assert result.gap < 1e-5


@pytest.mark.parametrize(
    "options", [{"foil": "b"}, {"target": "ab", "foil": "cd"}, {"target": "abc"}], ids=str
)
def test_alti_logit_of_any_question_adds_up_token_by_token(tiny, options):
    """What falls on the branches' own tokens counts too, though it is no unit's."""
    result = attribute(tiny[0], ask(*tiny, PROMPT, **options), "alti_logit", each=True)
    assert result.gap < 1e-4 and (result.gaps < 1e-4).all()
    same(result.each.sum(dim=0), result.scores)


@pytest.mark.parametrize("seed", [33, 53, 176])
def test_alti_logit_adds_up_where_the_terms_of_a_position_cancel(seed):
    """Of the first 300 toys these three have a position to whose sum no term comes nearer."""
    model, tokenizer = tiny_llama(seed=seed)
    assert METHODS["alti_logit"].refusal(model) is None
    for prompt in (PROMPT, tokenizer.decode([3, 4, 5, 6])):
        assert attribute(model, ask(model, tokenizer, prompt), "alti_logit").gap < 1e-4


def test_a_row_of_shares_sums_to_1_whatever_cancels():
    states = torch.tensor([[1.0, -2.0], [4.0, -4.0], [0.5, 1.0]])
    carried = torch.tensor([[[9.0, -9.0], [-8.0, 8.0], [3.0, 1.0]]])  # [heads, seq, dim]
    weights = torch.tensor([[[1.0, 0, 0], [0.5, 1.0, 0], [0.2, 0.3, 0.5]]])
    shares, _ = _shares(states, weights, carried)
    same(shares.sum(dim=-1), torch.ones(3))
    same(shares[1], torch.tensor([0.0, 1.0, 0.0]))  # 4.5 - 8 + 4 of it is 0.5: none comes nearer


def test_a_row_of_a_contrast_is_that_of_its_branch_alone(tiny):
    rows = attribute(
        tiny[0], ask(*tiny, PROMPT, target="ab", foil="cd"), "alti_logit", each=True
    ).each
    pair = attribute(tiny[0], ask(*tiny, PROMPT, target="a", foil="c"), "alti_logit")
    same(rows[0], pair.scores)
    for row, (before, target), sign in ((rows[1], "ab", 1), (rows[2], "cd", -1)):
        alone = attribute(tiny[0], ask(*tiny, PROMPT + before, target=target), "alti_logit")
        same(row, sign * alone.scores[: len(PROMPT)])


def test_what_moves_is_taken_in_pieces_on_a_long_prompt(tiny, monkeypatch):
    question = ask(*tiny, PROMPT * 4)
    whole = attribute(tiny[0], question, "alti_logit").scores
    monkeypatch.setattr("helpers.attribution.decomposition.VECTORS_AT_ONCE", 4000)
    same(attribute(tiny[0], question, "alti_logit").scores, whole, 1e-5)


def test_alti_logit_refuses_what_is_not_a_llama(tiny):
    linear = LinearCausalModel(tiny[1])
    with pytest.raises(InputError, match="LinearCausalModel"):
        attribute(linear, ask(linear, tiny[1], "a", target="b"), "alti_logit")
