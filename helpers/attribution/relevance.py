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

import torch
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from helpers.attribution.engine import attending, embed_prompt, objective
from helpers.attribution.path import completeness_gap
from helpers.attribution.result import Attribution
from helpers.errors import InputError


def relevance(model, question, through_attention=True):
    """The share of the objective that AttnLRP hands back to each token: signed, in logits.

    One forward and one backward pass. With ``through_attention=False`` the attention weights are
    constants and all relevance goes through the values (CP-LRP, Ali et al. 2022,
    arXiv:2202.07304). Every rule left then passes on what it received, and in a model without
    biases the scores add up to the objective.

    By default queries and keys are credited too. The softmax between them is expanded at its
    logits to first order and its constant part is given to no token, so the scores need not add
    up: ``gap`` is how much was lost or added on the way, and says nothing about whether the rules
    are the right ones. No tolerance is asked, so ``closed`` is ``None``.

    Raises ``InputError`` for a model that is not a Llama. Source: Achtibat et al. 2024,
    arXiv:2402.05602. notebooks/09_relevance.ipynb takes it apart.
    """
    embeds = embed_prompt(model, question).requires_grad_(True)
    with relevance_rules(model, through_attention):
        value = objective(model, embeds, question).sum()
        (slope,) = torch.autograd.grad(value, embeds)  # [1, seq, dim], no longer the gradient
    scores = (slope.float() * embeds.detach().float()).sum(dim=-1)[0]
    return Attribution(scores, gap=completeness_gap(scores, value.detach()), evaluations=1)


@contextlib.contextmanager
def relevance_rules(model, through_attention=True):
    """Let a backward pass of ``model`` propagate relevance while inside; forward is unchanged.

    The gradient times the activation is then, at any place of the network, the relevance there.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise InputError(
            f"Relevance has rules for LlamaForCausalLM, and this is a {type(model).__name__}: "
            "take a Llama, or another method, such as integrated_gradients."
        )
    attend = attention_rule if through_attention else attention_kept_constant
    # attention stays fused: no [seq, seq] map is kept for the backward pass
    fused = "sdpa_float32" if model.config._attn_implementation == "sdpa_float32" else "sdpa"
    attend = attend(AttentionInterface()[fused])
    with rules_in_place(model, identity_rule, product_rule, attend):
        yield


@contextlib.contextmanager
def rules_in_place(model, after, before, attend):
    """Put rules where a Llama needs one, while inside.

    ``after`` is a forward hook of norms and activations, ``before`` a forward pre-hook of what
    takes the product of gate and up, and ``attend`` the attention of every layer.
    """
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                hooks.callback(module.register_forward_hook(after).remove)
            elif isinstance(module, LlamaMLP):
                hooks.callback(module.act_fn.register_forward_hook(after).remove)
                hooks.callback(module.down_proj.register_forward_pre_hook(before).remove)
        hooks.enter_context(attending(model, attend))
        yield


def with_slope(value, slope, x):
    """``value``, to the last bit, which a backward pass takes for ``slope`` times ``x``.

    Introduced in notebooks/09_relevance.ipynb.
    """
    return value.detach() + (slope * (x - x.detach())).to(value.dtype)


def identity_rule(module, args, out):
    """A norm or an activation, a forward hook: its slope is out / x, so all relevance passes on.

    For RMSNorm that slope is weight / rms, the rms taken for a constant.

    Introduced in notebooks/09_relevance.ipynb.
    """
    (x,) = args
    slope = (out.float() / x.float()).detach()
    return with_slope(out, slope.where(x != 0, 0), x)


def product_rule(down_proj, args):
    """What gate and up made together, a forward pre-hook: each factor gets half.

    Introduced in notebooks/09_relevance.ipynb.
    """
    (x,) = args
    return (with_slope(x, 0.5, x),)


def attention_rule(attend):
    """``attend`` with both of its products shared out: a half to values, a quarter to q and k.

    weights x values gives each a half. The softmax keeps its own gradient, and q x k gives each a
    half of what arrives there, which is a half already. The same factors as in lxt 2.1.

    Introduced in notebooks/09_relevance.ipynb.
    """

    def shared(module, query, key, value, mask, **options):
        query, key = with_slope(query, 0.25, query), with_slope(key, 0.25, key)
        return attend(module, query, key, with_slope(value, 0.5, value), mask, **options)

    return shared


def attention_kept_constant(attend):
    """``attend`` with weights that are constants: linear in the values, which get all.

    Introduced in notebooks/09_relevance.ipynb.
    """

    def constant(module, query, key, value, mask, **options):
        return attend(module, query.detach(), key.detach(), value, mask, **options)

    return constant
