"""The machine under the methods: the objective, its gradient, and how rows are run.

Nothing here knows a method. Rows are variants of one prompt, as embeddings [rows, seq, dim]; they
all have the same length, so no padding and no mask are needed.
"""

import contextlib
from dataclasses import replace

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaForCausalLM,
)

from helpers.errors import InputError

# rows x seq in one pass. More was no faster on two CPU cores; a GPU wants more, how much more has
# not been measured.
TOKENS_PER_BATCH = {"cpu": 2048, "other": 16_384}
PRECISIONS = {"bfloat16": torch.bfloat16}


# --- the objective -----------------------------------------------------------------------------


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


def contrast(logits, question):
    """The objective as it reads in logits [rows, vocab]: FloatTensor [rows]."""
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


# --- the model while a method runs -------------------------------------------------------------


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


class AnswerHead(nn.Module):
    """The rows of an output layer that belong to some token ids; always in full precision."""

    def __init__(self, head, token_ids):
        super().__init__()
        self.weight = nn.Parameter(head.weight.detach()[token_ids].float(), requires_grad=False)
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach()[token_ids].float(), False)

    def forward(self, hidden):
        return F.linear(hidden.float().to(self.weight.device), self.weight, self.bias)


@contextlib.contextmanager
def answer_only(model, question):
    """Let the model compute only what the objective depends on, while inside.

    A logit is the last hidden state times one row of the output layer. All the vocabulary's rows,
    and the zeros that a backward pass sends through them, are a large part of the time on a short
    prompt; see ``output_layer`` for what else is left out.

    Gives the question as the smaller model sees it: its target is logit 0, its foil logit 1. A
    model whose output layer is not a plain matrix, or lies outside of memory, is left as it is.
    """
    head = plain_output_layer(model)
    if head is None:
        yield question
        return
    token_ids = [question.target] + ([] if question.foil is None else [question.foil])
    with output_layer(model, AnswerHead(head, token_ids)):
        yield replace(question, target=0, foil=None if question.foil is None else 1)


def plain_output_layer(model):
    """The output layer of ``model`` if it is a plain matrix in memory, else ``None``."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
        return None
    return head


@contextlib.contextmanager
def output_layer(model, layer):
    """Let ``layer`` be the model's output layer while inside, of which the last position is read.

    After the last layer's attention only the last position goes on to the answer: its output
    projection and feed-forward are computed there alone, and what they return is added to the
    residual stream of every position, of which only the last one is read.
    """
    head = model.get_output_embeddings()
    hooks = []
    try:
        for module in _pointwise_after_last_attention(model):
            hooks.append(module.register_forward_pre_hook(lambda m, args: (args[0][:, -1:],)))
        model.set_output_embeddings(layer)
        yield
    finally:
        model.set_output_embeddings(head)
        for hook in hooks:
            hook.remove()


def _pointwise_after_last_attention(model):
    """Modules of a Llama's last layer that treat each position by itself; none in other models."""
    if not isinstance(model, LlamaForCausalLM):
        return []
    last = model.model.layers[-1]
    return [last.self_attn.o_proj, last.mlp]


@contextlib.contextmanager
def working_precision(model, precision):
    """Do the products with weights in ``precision`` while inside; ``None`` leaves all as it is.

    Weights are cast once, where autocast would cast frozen ones at every pass, and a normed
    activation once for the two or three products that it feeds. The residual stream, the norms,
    the rotary angles, attention (whose fused backward pass is slower in half precision on a CPU)
    and the answer's logits stay in float32. Takes half of the model's memory once more. Raises
    ``InputError`` for a precision that is not known.
    """
    if precision is None:
        yield
        return
    if precision not in PRECISIONS:
        raise InputError(f"The precision {precision!r} is unknown: use {', '.join(PRECISIONS)}.")
    dtype = PRECISIONS[precision]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module is not head
        and module.weight.dtype == torch.float32
        and not module.weight.is_meta  # offloaded to disk or CPU memory
    ]
    found = [(linear, linear.weight, linear.bias) for linear in linears]
    attending = getattr(model.config, "_attn_implementation", None)
    hooks = []
    try:
        for linear, weight, bias in found:
            linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
            cast = linear.register_forward_pre_hook(lambda m, args: (args[0].to(dtype),))
            hooks.append(cast)
        if found and isinstance(model, LlamaForCausalLM):
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    hooks.append(norm.register_forward_hook(lambda m, args, out: out.to(dtype)))
        if found and attending is not None:
            model.set_attn_implementation("sdpa_float32")
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for linear, weight, bias in found:
            linear.weight, linear.bias = weight, bias
        if attending is not None:
            model.set_attn_implementation(attending)


def _sdpa_float32(module, query, key, value, mask, **options):
    """torch's fused attention in float32, whatever precision the projections came in."""
    attend = AttentionInterface()["sdpa"]
    return attend(module, query.float(), key.float(), value.float(), mask, **options)


AttentionInterface.register("sdpa_float32", _sdpa_float32)
AttentionMaskInterface.register("sdpa_float32", AttentionMaskInterface()["sdpa"])


@contextlib.contextmanager
def attending(model, function):
    """Let every layer attend through ``function`` while inside; it takes what torch's own takes.

    ``function(module, query, key, value, mask, scaling, **options)`` returns the attention's output
    [rows, seq, heads, head_dim] and ``None``; ``sdpa`` below is torch's fused one, to call it with.
    """
    name = f"helpers_{function.__name__}"
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    found = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(found)


def sdpa(module, query, key, value, mask, **options):
    """torch's fused attention, under the name that transformers knows it by."""
    return AttentionInterface()["sdpa"](module, query, key, value.to(query.dtype), mask, **options)


def attention_weights(query, key, mask, scaling):
    """The weights of one prompt's attention, [heads, seq, seq] in float32.

    ``query`` [1, heads, seq, dim], ``key`` [1, kv heads, seq, dim]; a ``mask`` of ``None`` is the
    causal one.
    """
    seq = query.shape[2]
    grouped = query[0].unflatten(0, (key.shape[1], -1))  # [kv heads, heads per kv, seq, dim]
    weights = (grouped @ key[0][:, None].transpose(-1, -2)).float().flatten(0, 1) * scaling
    seen = torch.ones(seq, seq, dtype=torch.bool, device=query.device).tril()
    if mask is not None:  # a sliding window
        seen = mask[0, 0, :, :seq]
    return weights.masked_fill(~seen, -torch.inf).softmax(dim=-1)


# --- batches -----------------------------------------------------------------------------------


def rows_per_batch(seq, tokens=TOKENS_PER_BATCH["cpu"]):
    """How many prompts of ``seq`` tokens go through the model together, at ``tokens`` a pass."""
    return max(1, tokens // seq)


def token_budget(model):
    """Tokens (rows x seq) that one forward and backward pass may take.

    As many as make the machine fast, unless half of the memory that is free holds fewer.
    """
    device = model.get_input_embeddings().weight.device
    most = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"]
    return max(1, min(most, int(0.5 * free_memory(device) / gradient_bytes(model))))


def free_memory(device):
    """Bytes that ``device`` has free."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    free, _ = torch.accelerator.get_memory_info(device)
    held = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return free + held  # torch keeps what it once had and gives it out again


def gradient_bytes(model):
    """Bytes a token keeps between the forward and the backward pass through frozen weights.

    Per layer: 8 vectors of the model's width (both norms' inputs and outputs, queries, keys,
    values, the heads' output) and 3 of the feed-forward's; a quarter more for what comes and goes.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    if not hasattr(config, "intermediate_size"):
        return 1
    floats = 8 * config.hidden_size + 3 * config.intermediate_size
    return int(1.25 * 4 * config.num_hidden_layers * floats)


def in_batches(model, run, items, seq):
    """``run`` on consecutive slices of ``items``, its results as a list.

    ``items`` is anything with a length that can be sliced; each stands for one row of ``seq``
    tokens. A slice holds what ``token_budget`` allows and is halved when memory runs out all the
    same; what was computed is kept. One row that does not fit raises the error it met.
    """
    size = rows_per_batch(seq, token_budget(model))
    results, done = [], 0
    while done < len(items):
        some = items[done : done + size]
        result = _unless_out_of_memory(run, some)
        if result is None:
            size = len(some) // 2
            clear_device_cache(garbage_collection=True)
        else:
            results.append(result)
            done += len(some)
    return results


def _unless_out_of_memory(run, some):
    """``run(some)``, or ``None`` if memory ran out and ``some`` can still be halved.

    A function of its own, so that the error is gone when it returns, and with it the tensors that
    its traceback holds.
    """
    try:
        return run(some)
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, MemoryError) or should_reduce_batch_size(error)
        if len(some) == 1 or not ran_out:
            raise
        return None


# --- what causality saves ----------------------------------------------------------------------


def prompt_cache(model, embeds):
    """The logits [rows, vocab] after prompts ``embeds`` [rows, seq, dim], their keys and values.

    The second is ``None`` for a model that keeps no keys and values, or forgets some.
    """
    output = model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    cache = getattr(output, "past_key_values", None)
    whole = isinstance(cache, DynamicCache) and not any(cache.is_sliding)
    return output.logits[:, -1].float(), cache if whole else None


def logits_after(model, embeds, first, cache):
    """The logits [rows, vocab] of rows that equal the cached prompt up to position ``first``.

    ``embeds`` [rows, seq - first, dim] is what comes from there on. In a causal model no position
    sees a later one, so the keys and values of the others are those in ``cache``; where it holds
    several prompts, the rows are those prompts in order, as often as wanted.
    """
    if first == 0:
        return model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    past = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (
            kept[:, :, :first].expand(len(embeds) // len(kept), -1, -1, -1, -1).flatten(0, 1)
            for kept in (layer.keys, layer.values)
        )
        past.update(keys, values, index)
    output = model(inputs_embeds=embeds, past_key_values=past, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].float()
