"""How much each token of a prompt moved the prediction: one function a method.

All methods explain one number, the objective: the logit of the target, less the logit of the foil
where there is one. They return an ``Attribution``, which carries its own evidence: how far the
scores are from adding up (``gap``) and what they cost (``evaluations``, ``forwards``).

A method is a function ``(model, question, ...) -> Attribution``. To add one, write it and name it
in ``METHODS``; comparison, reports and benchmarks pick it up from there.
"""

import contextlib
import time
from dataclasses import dataclass, replace

import torch
from captum.attr import IntegratedGradients

from helpers.errors import InputError

TOKENS_PER_BATCH = 2048  # rows x seq in one forward pass; more is no faster on a CPU


@dataclass(frozen=True)
class Attribution:
    """Scores with the evidence that goes with them.

    ``scores``       FloatTensor [seq] on the CPU; in logits where the method has a sign
    ``gap``          |sum(scores) - moved| / max(|moved|, 1 logit), where ``moved`` is how much the
                     objective changes from the baseline to the prompt; ``None`` where the method
                     does not promise that its scores add up
    ``evaluations``  rows of which a gradient was computed
    ``forwards``     rows that were only run forward
    ``signed``       whether a negative score means "pushed the answer away"
    ``method``, ``seconds``  filled in by ``attribute``
    """

    scores: torch.Tensor
    gap: float | None = None
    evaluations: int = 0
    forwards: int = 0
    signed: bool = True
    method: str = ""
    seconds: float = 0.0


def attribute(model, question, method, **options):
    """The attribution of ``question`` by ``method``, a key of ``METHODS``.

    ``options`` are the method's own, for example ``n_steps`` for ``"integrated_gradients"``. The
    model is left as it was found. Raises ``InputError`` for an unknown method.
    """
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")
    started = time.perf_counter()
    with frozen(model):
        result = METHODS[method](model, question, **options)
    return replace(
        result,
        method=method,
        scores=result.scores.detach().float().cpu(),
        seconds=time.perf_counter() - started,
    )


# --- what the methods share --------------------------------------------------------------------


def embed_prompt(model, question):
    """The prompt's token embeddings [1, seq, dim], detached: the input that is explained.

    Introduced in notebooks/04_embeddings.ipynb.
    """
    return model.get_input_embeddings()(question.input_ids).detach()


def objective(model, embeds, question):
    """The number to explain, for each row of ``embeds`` [rows, seq, dim]: FloatTensor [rows].

    The logit of the target after the last position, less that of the foil. Only that position's
    logits are computed (``logits_to_keep=1``); the others would be the largest tensor of all.

    Introduced in notebooks/05_gradients.ipynb.
    """
    logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    if question.foil is None:
        return logits[:, question.target]
    return logits[:, question.target] - logits[:, question.foil]


def objective_gradient(model, embeds, question):
    """The gradient of the objective with respect to ``embeds``, of the same shape.

    ``autograd.grad`` computes this gradient and no other; ``backward()`` would also fill the
    ``.grad`` of every weight that is not frozen.

    Introduced in notebooks/05_gradients.ipynb.
    """
    embeds = embeds.detach().requires_grad_(True)  # a leaf
    (grad,) = torch.autograd.grad(objective(model, embeds, question).sum(), embeds)
    return grad


def baseline_embeds(model, question, baseline="mean"):
    """What a prompt that says nothing looks like: embeddings [1, seq, dim] to compare with.

    ``"mean"`` puts the average of all token embeddings at each position, ``"eos"`` the
    end-of-text token's, ``"zero"`` zeros; a tensor is used as it is, broadcast to [1, seq, dim].

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    table = model.get_input_embeddings().weight.detach()  # [vocab, dim]
    if isinstance(baseline, torch.Tensor):
        return baseline.to(embeds).expand_as(embeds)
    if baseline == "mean":
        return table.float().mean(dim=0).to(embeds).expand_as(embeds)
    if baseline == "eos":
        eos = model.config.eos_token_id
        return table[eos[0] if isinstance(eos, list) else eos].expand_as(embeds)
    if baseline == "zero":
        return torch.zeros_like(embeds)
    raise InputError(f"There is no baseline {baseline!r}: use mean, eos, zero or a tensor.")


def completeness_gap(scores, moved):
    """|sum(scores) - moved| / max(|moved|, 1 logit): 0 when the scores account for all of it.

    The denominator is never below one logit: where the objective hardly moved, a ratio to
    nothing would say nothing.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    return float(abs(scores.sum() - moved)) / max(abs(float(moved)), 1.0)


def rows_per_batch(seq):
    """How many prompts of ``seq`` tokens go through the model together."""
    return max(1, TOKENS_PER_BATCH // seq)


@contextlib.contextmanager
def frozen(model):
    """Ask no gradient of any weight while inside, and leave the model as it was found."""
    thawed = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in thawed:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in thawed:
            weight.requires_grad_(True)


# --- gradients ---------------------------------------------------------------------------------


def saliency(model, question):
    """How strongly the objective reacts to a nudge of each token: L2 norm of its gradient, >= 0.

    Source: Simonyan et al. 2013, arXiv:1312.6034. Introduced in notebooks/05_gradients.ipynb.
    """
    grad = objective_gradient(model, embed_prompt(model, question), question)  # [1, seq, dim]
    return Attribution(grad.norm(dim=-1)[0], evaluations=1, signed=False)


def gradient_x_input(model, question):
    """The gradient times the embedding, summed over the hidden dimension: signed, in logits.

    Exact for a model that is linear in its embeddings; a first-order guess for any other.
    Source: Shrikumar et al. 2016, arXiv:1605.01713. Introduced in notebooks/05_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    grad = objective_gradient(model, embeds, question)  # [1, seq, dim]
    return Attribution((grad * embeds).sum(dim=-1)[0], evaluations=1)


# --- attention ---------------------------------------------------------------------------------


def attention(model, question):
    """How much the last position attends to each token, averaged over layers and heads.

    Scores are >= 0 and sum to 1. They do not depend on target or foil: attention says where the
    model looked, not what it concluded. Introduced in notebooks/06_attention.ipynb.
    """
    rows = last_attention_rows(model, question)  # [layers, heads, seq]
    return Attribution(rows.mean(dim=(0, 1)), forwards=1, signed=False)


def last_attention_rows(model, question):
    """The last position's attention weights in every layer and head: [layers, heads, seq].

    The default attention implementation (sdpa) never forms the weights, so the model is switched
    to the eager one and back. Each layer's full map lives only until its last row is copied.

    Introduced in notebooks/06_attention.ipynb.
    """
    rows = []

    def keep_last_row(module, inputs, outputs):
        rows.append(outputs[1][0, :, -1].float())  # weights are [1, heads, seq, seq]

    found = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [layer.self_attn.register_forward_hook(keep_last_row) for layer in model.model.layers]
    try:
        with torch.inference_mode():
            model(question.input_ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(found)
    return torch.stack([row.to(rows[0].device) for row in rows])


# --- integrated gradients ----------------------------------------------------------------------


def integrated_gradients(model, question, baseline="mean", n_steps=50):
    """Captum's integrated gradients, summed over the hidden dimension: signed, in logits.

    Gradients are averaged over ``n_steps`` Gauss-Legendre points of the straight line from the
    baseline to the prompt, in batches. In the limit the scores add up to what the objective moved
    along the line. On a Llama, 50 steps may be far from that limit: read ``gap`` before the
    scores. Source: Sundararajan et al. 2017, arXiv:1703.01365.

    Introduced in notebooks/07_integrated_gradients.ipynb.
    """
    embeds = embed_prompt(model, question)
    start = baseline_embeds(model, question, baseline)
    per_feature = IntegratedGradients(lambda rows: objective(model, rows, question)).attribute(
        embeds,
        baselines=start,
        n_steps=n_steps,
        internal_batch_size=rows_per_batch(embeds.shape[1]),
    )  # [1, seq, dim]
    scores = (
        per_feature.sum(dim=-1)[0].detach().float()
    )  # the sum keeps completeness, a norm would not
    with torch.inference_mode():
        end_value, start_value = objective(model, torch.cat([embeds, start]), question)
    gap = completeness_gap(scores, end_value - start_value)
    return Attribution(scores, gap=gap, evaluations=n_steps, forwards=2)


# --- replacing tokens --------------------------------------------------------------------------


def occlusion(model, question, baseline="mean"):
    """How far the objective falls when one token at a time is replaced: signed, in logits.

    Each token's embedding in turn is replaced by the baseline's; one forward pass a token.
    Source: Zeiler and Fergus 2014, arXiv:1311.2901. Introduced in notebooks/08_comparison.ipynb.
    """
    embeds = embed_prompt(model, question)
    blank = baseline_embeds(model, question, baseline)
    seq = embeds.shape[1]
    values = []
    with torch.inference_mode():
        whole = objective(model, embeds, question)  # [1]
        for positions in torch.arange(seq).split(rows_per_batch(seq)):
            rows = embeds.repeat(len(positions), 1, 1)  # [rows, seq, dim]
            rows[range(len(positions)), positions] = blank[0, positions]
            values.append(objective(model, rows, question))
    return Attribution(whole - torch.cat(values), forwards=seq + 1)


# --- the control -------------------------------------------------------------------------------


def random(model, question, seed=0):
    """Scores that know nothing, from a seeded normal distribution: what any method has to beat.

    Introduced in notebooks/08_comparison.ipynb.
    """
    generator = torch.Generator().manual_seed(seed)
    return Attribution(torch.randn(question.input_ids.shape[1], generator=generator))


METHODS = {
    "saliency": saliency,
    "gradient_x_input": gradient_x_input,
    "attention": attention,
    "integrated_gradients": integrated_gradients,
    "occlusion": occlusion,
    "random": random,
}
