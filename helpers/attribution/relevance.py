"""AttnLRP: a logit handed back through the network, layer by layer, until the tokens hold it.

Layer-wise relevance propagation (LRP) divides the relevance of a layer's output among its inputs
by what each put in. Written as gradient times input, that is an ordinary backward pass in which a
few slopes are others than the derivative. The rules are those of Achtibat et al. 2024,
arXiv:2402.05602, and the code is written from that paper, not from its authors' package.

Notice. The authors' own package, lxt, is under the Clear BSD licence, which grants no patent
rights, and its README calls LRP a patented technology, free of charge for personal and scientific
purposes only. What that means for another use is a question for whoever plans that use.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from torch.utils._pytree import tree_map_only

from helpers.architectures import Norm, once_a_model, places_of, stack_of
from helpers.attribution.engine import (
    Asked,
    attending,
    few_tokens,
    last_states,
    refuses_attending,
    sdpa,
)
from helpers.attribution.perturbation import baseline_of
from helpers.attribution.result import Attribution, attributions
from helpers.errors import InputError


def relevance(
    asked: Asked, through_attention: bool = False, baseline: str | Tensor = "mean"
) -> list[Attribution]:
    """What the slopes of LRP say that each token changed, over an average one: signed, in nats.

    One forward and one backward pass whose slopes are those of layer-wise relevance propagation,
    times the *difference* of each embedding from the ``baseline``: the question that occlusion
    asks, for one gradient. ``"mean"`` is the average of all token embeddings, ``"eos"`` the
    end-of-text token's, a tensor such as the embeddings of a counterfactual prompt is broadcast to
    [columns, dim]. With ``"zero"`` scores are slope times embedding, as LRP is published: every
    token is then scored for being an embedding at all.

    By default the attention weights are constants and all relevance goes through the values
    (CP-LRP, Ali et al. 2022, arXiv:2202.07304). Every rule then passes on what it received: from
    ``"zero"``, in a model without biases, scores add up to the objective; for a log-probability, to
    the target's logit minus the mean logit that the model itself expects. With
    ``through_attention=True`` queries and keys are credited too (AttnLRP, Achtibat et al. 2024,
    arXiv:2402.05602). The softmax between them is expanded at its logits to first order and its
    constant part is given to no token.

    ``gap`` is how much was lost or added on the way, against what the objective gained from the
    baseline to the prompt (from ``"zero"``, against what came in), and says nothing about whether
    the rules are the right ones. No tolerance is asked, so ``closed`` is ``None``.

    Where a method of the gradient is wanted too, both go back from the same forward pass. Source of
    the difference: Rezaei Jafari et al. 2025, arXiv:2508.21258. Raises ``InputError`` for an
    unknown baseline. notebooks/09_relevance.ipynb takes it apart.
    """
    rows = asked.embeds.detach().requires_grad_(True)
    begin = rows.detach().clone()
    begin[:, :, : asked.columns] = baseline_of(asked, baseline)[:, None]
    from_nothing = isinstance(baseline, str) and baseline == "zero"
    difference = rows.detach() if from_nothing else rows.detach() - begin
    wanted = asked.found.get("wanted", frozenset())
    shared = "relevance" in wanted and wanted & {"saliency", "gradient_x_input"}
    shared = shared and "gradient" not in asked.found  # else another one asks that takes this in
    rules: Any = switchable_rules if shared else relevance_rules
    with rules(asked.model, through_attention) as switch:
        read, _ = asked.read(rows)
        values = asked.values_of(read)  # [questions, outs]
        if switch is not None:
            grads = [asked.in_columns(grad) for (grad,) in asked.gradients(values, rows, keep=True)]
            asked.found["gradient"] = torch.stack(grads, dim=1)
            switch.on = True
        both = [
            (slope.float() * difference, (outer.float() * read.detach()).sum(dim=(1, 2)))
            for slope, outer in asked.gradients(values, rows, read)
        ]
    products, moved = (torch.stack(some, dim=1) for some in zip(*both, strict=True))
    if not from_nothing:
        with torch.inference_mode():
            moved = values.detach() - asked.values(begin)
    scores = products[:, :, :, : asked.columns].sum(dim=(2, 4))  # [questions, outs, columns]
    totals = products.sum(dim=(2, 3, 4))
    cost = {"evaluations": 1, "forwards": 0 if from_nothing else 1}
    return attributions(asked, scores, totals=totals, moved=moved, **cost)


# The share that rounding may lose: 1e-5 in float32, 4 % in bfloat16 and 5 % in float16 on thirty
# layers. A norm without its rule loses all, as it does not care how long its input is.
LEAK, LEAK_IN_HALF = 1e-3, 0.3


@once_a_model
def refuses_rules(model: Any) -> str | None:
    """``None`` for a model that the rules fit, else why they do not. Tried once a model.

    Every part with weights has to be one that there is a rule for, or linear. Then the rules are
    tried on a few tokens: forward, they must change nothing, to the last bit; and what goes back
    with constant attention weights must be all that came in, with what biases put in counted.
    """
    name = type(model).__name__
    other = "take another method, such as integrated_gradients."
    try:
        stranger = places_of(model).stranger
    except InputError as error:
        return f"{str(error).removesuffix('.')}: {other}"
    if stranger is not None:
        return f"It has no rule for the {stranger} of a {name}: {other}"
    refused = refuses_attending(model)
    if refused is not None:
        return refused
    if not _conserves(model):
        return f"Its rules do not fit a {name}, which was tried: they lose relevance: {other}"
    return None


def _conserves(model):
    embeds, (layers, norm) = few_tokens(model), stack_of(model)
    seen: list[tuple[Tensor, Tensor | float]] = []  # where relevance comes in, and what of it

    def keep_input(module, args):
        seen.append((args[0], args[0]))

    def keep_bias(module, args, out):
        if not getattr(out, "requires_grad", False):
            return  # of a router
        with align_module_device(module):  # what is offloaded comes for as long
            seen.append((out, module.bias.detach().to(out)))

    def run():
        return last_states(model, embeds)[0, -1]  # [dim]

    with torch.no_grad(), attending(model, sdpa):
        plain = run()
    with contextlib.ExitStack() as stack:
        embeds.requires_grad_(True)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(relevance_rules(model, through_attention=False))
        stack.enter_context(layers[0].register_forward_pre_hook(keep_input))
        for module in chain(layers.modules(), [norm]):
            if getattr(module, "bias", None) is not None:
                stack.enter_context(module.register_forward_hook(keep_bias))
        ruled = run()
        direction = plain.sign()  # so that nothing cancels
        total = (ruled * direction).sum()
        slopes = torch.autograd.grad(total, [each for each, _ in seen], allow_unused=True)
    back = sum(
        (slope.float() * what.detach().float()).sum().item()
        for slope, (_, what) in zip(slopes, seen, strict=True)
        if slope is not None
    )
    leak = abs(back - total.item()) / abs(total.item())
    most = LEAK if embeds.dtype == torch.float32 else LEAK_IN_HALF
    return torch.equal(ruled, plain) and leak <= most


@contextlib.contextmanager
def relevance_rules(model: Any, through_attention: bool = True) -> Iterator[None]:
    """Let a backward pass of ``model`` propagate relevance while inside; forward is unchanged.

    The gradient times the activation is then, at any place of the network, the relevance there.
    """
    rule = attention_rule if through_attention else attention_kept_constant
    # attention stays fused: no [seq, seq] map is kept for the backward pass
    with rules_in_place(model, rule(sdpa)):
        yield


@contextlib.contextmanager
def switchable_rules(model: Any, through_attention: bool = True) -> Iterator[SimpleNamespace]:
    """``relevance_rules`` that can be switched on between a forward pass and a backward one.

    Gives an object with ``on``, false at first: what is then handed back is the gradient.
    """
    switch = SimpleNamespace(on=False)

    def either(value, ruled):
        return Either.apply(value, ruled, switch)

    def attend_by_either(module, query, key, value, mask, **options):
        def attend(module, *ruled, **options):
            *ruled, mask = ruled
            inputs = [either(*both) for both in zip((query, key, value), ruled, strict=True)]
            return sdpa(module, *inputs, mask, **options)

        return rule(attend)(module, query, key, value, mask, **options)

    rule = attention_rule if through_attention else attention_kept_constant
    with rules_in_place(model, attend_by_either, either):
        yield switch


class Either(torch.autograd.Function):
    """A value with two ways back: through ``value``, or with the switch on through ``ruled``."""

    @staticmethod
    def forward(ctx, value, ruled, switch):
        ctx.switch = switch
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return (None, grad, None) if ctx.switch.on else (grad, None, None)


@contextlib.contextmanager
def rules_in_place(
    model: Any, attend: Callable, take: Callable = lambda value, ruled: ruled
) -> Iterator[None]:
    """Put rules where a model needs one, while inside.

    ``attend`` is the attention of every layer. ``take(value, ruled)`` is what goes on of a value
    and the same value with a rule behind it.
    """
    places = places_of(model)

    def after(rule):
        return lambda module, args, out: take(out, rule(module, args, out))

    def before(module, args):
        return (take(args[0], *product_rule(module, args)),)

    def constant(module, args, out):
        return tree_map_only(Tensor, lambda each: take(each, each.detach()), out)

    with contextlib.ExitStack() as hooks:
        for module, norm in places.norms.items():
            rule = partial(layer_norm_rule, norm) if norm.centred else identity_rule
            hooks.enter_context(module.register_forward_hook(after(rule)))
        for module in places.activations:
            hooks.enter_context(module.register_forward_hook(after(identity_rule)))
        for module in places.products:
            hooks.enter_context(module.register_forward_pre_hook(before))
        for module in places.experts:  # a half of all that comes out of a product inside
            hooks.enter_context(module.register_forward_hook(after(half_rule)))
        for module in places.routers:
            hooks.enter_context(module.register_forward_hook(constant))
        hooks.enter_context(attending(model, attend))
        yield


def with_slope(value: Tensor, slope: Any, x: Tensor) -> Tensor:
    """``value``, to the last bit, which a backward pass takes for ``slope`` times ``x``.

    Introduced in notebooks/09_relevance.ipynb.
    """
    return value.detach() + (slope * (x - x.detach())).to(value.dtype)


def identity_rule(module: Any, args: tuple, out: Tensor) -> Tensor:
    """A norm or an activation, a forward hook: its slope is out / x, so all relevance passes on.

    For RMSNorm that slope is weight / rms, the rms taken for a constant.

    Introduced in notebooks/09_relevance.ipynb.
    """
    (x,) = args
    slope = (out.float() / x.float()).detach()
    return with_slope(out, slope.where(x != 0, 0), x)


def layer_norm_rule(norm: Norm, module: Any, args: tuple, out: Tensor) -> Tensor:
    """LayerNorm, a forward hook: linear in what is left of the mean, its deviation a constant.

    What its bias puts in is credited to no input. Source: Ali et al. 2022, arXiv:2202.07304.
    """
    centred = norm.centre(args[0])
    return with_slope(out, norm.slope(centred.detach()), centred)


def half_rule(experts: Any, args: tuple, out: Tensor) -> Tensor:
    """Experts, a forward hook: of the product of gate and up inside, each factor gets half.

    All that is behind the product is linear, so that it makes no difference where the half is
    taken. What weighs the experts is a constant.
    """
    return with_slope(out, 0.5, out)


def product_rule(down_proj: Any, args: tuple) -> tuple[Tensor]:
    """What gate and up made together, a forward pre-hook: each factor gets half.

    Introduced in notebooks/09_relevance.ipynb.
    """
    (x,) = args
    return (with_slope(x, 0.5, x),)


def attention_rule(attend: Callable) -> Callable:
    """``attend`` with both of its products shared out: a half to values, a quarter to q and k.

    weights x values gives each a half. The softmax keeps its own gradient, and q x k gives each a
    half of what arrives there, which is a half already. The same factors as in lxt 2.1.

    Introduced in notebooks/09_relevance.ipynb.
    """

    def shared(module, query, key, value, mask, **options):
        query, key = with_slope(query, 0.25, query), with_slope(key, 0.25, key)
        return attend(module, query, key, with_slope(value, 0.5, value), mask, **options)

    return shared


def attention_kept_constant(attend: Callable) -> Callable:
    """``attend`` with weights that are constants: linear in the values, which get all.

    Introduced in notebooks/09_relevance.ipynb.
    """

    def constant(module, query, key, value, mask, **options):
        return attend(module, query.detach(), key.detach(), value, mask, **options)

    return constant
