"""Methods that take the answer's logit apart into what each position brought to it."""

import contextlib
from typing import Any, NamedTuple

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from helpers.architectures import (
    Norm,
    once_a_model,
    output_projection,
    places_of,
    stack_of,
)
from helpers.attribution.engine import (
    Asked,
    attending,
    attention_weights,
    few_tokens,
    last_states,
    refuses_attending,
    sdpa,
)
from helpers.attribution.result import Attribution, attributions
from helpers.errors import InputError

MISSED, MISSED_IN_HALF = 1e-3, 0.1  # parts that miss more are not the model's
VECTORS_AT_ONCE = 2**21  # numbers in what one layer moves between positions: they stay in a cache


def alti_logit(asked: Asked) -> list[Attribution]:
    """Each token's part in the objective, by following what attention moves: signed, in nats.

    With the final norm's scale held fixed, a logit is a sum over the layers of what each one adds
    to the last position: attention adds one vector for each position it reads, the feed-forward
    one. A vector read from a position is shared among the tokens that are mixed in that position,
    by ALTI: a source counts as far as the mixture comes nearer to it (in the L1 norm). What the
    feed-forward adds, and the last token's own embedding, is shared in the same way, so that all of
    the objective is accounted for; the paper leaves the feed-forward out. The scores add up to the
    objective itself, not to its difference from a baseline; for a log-probability, to the target's
    logit minus the mean logit that the model itself expects.

    Source: Ferrando et al. 2023, arXiv:2305.12535, and 2022, arXiv:2203.04212.

    notebooks/10_faithfulness.ipynb uses it.
    """
    asked.settle()
    questions, texts, length = asked.embeds.shape[:3]
    scores = torch.zeros(questions, len(asked.positions), length)
    moved = torch.zeros(questions, len(asked.positions))
    for row in range(questions):
        asked.look(asked.positions[None], length)
        mine = [(asked.text_of == text).nonzero()[:, 0] for text in range(texts)]
        seen = [
            _run(asked.model, text[None], asked.positions[some])
            for text, some in zip(asked.embeds[row], mine, strict=True)
        ]
        hidden = torch.cat([each.read for each in seen])[torch.cat(mine).argsort()]
        directions = asked.slopes(hidden[None], torch.tensor([row]))[0]  # [outputs, dim]
        moved[row] = (directions.float() * hidden.float()).sum(dim=1)
        for some, each in zip(mine, seen, strict=True):
            read = directions[some.to(directions.device)].float()
            scores[row, some] = _parts(asked.model, each, read).cpu()
    totals = scores.sum(dim=2)
    if not asked.each:
        scores, totals, moved = (some.sum(dim=1, keepdim=True) for some in (scores, totals, moved))
    return attributions(asked, scores[..., : asked.columns], totals=totals, moved=moved, forwards=1)


@once_a_model
def refuses_parts(model: Any) -> str | None:
    """``None`` for a model whose layers can be taken apart here, else why they cannot.

    It is tried once a model, on a few tokens.
    """
    return refuses_attending(model) or _refusal(model)


def _refusal(model):
    try:
        seen = _run(model, few_tokens(model), torch.tensor([-1]))
        read = seen.read.float()
        found, expected = _parts(model, seen, read.sign()).sum(), read.abs().sum()
        fits = abs(found - expected) <= _tolerance(model)[0] * expected
        return None if fits else str(_otherwise(model, "its parts do not add up"))
    except InputError as error:
        return str(error)


def _otherwise(model, fault):
    return InputError(
        f"It cannot take the layers of a {type(model).__name__} apart, as {fault}: take another "
        "method, such as integrated_gradients."
    )


def _tolerance(model):
    """The share that parts may miss, and what the numbers of a stream are rounded by."""
    first = stack_of(model).layers[0]
    if all(weight.dtype == torch.float32 for weight in first.parameters()):
        return MISSED, torch.finfo(torch.float32).eps
    return MISSED_IN_HALF, torch.finfo(torch.bfloat16).eps


class Seen(NamedTuple):
    """What some positions of one text read in one forward pass, in float32 but for ``read``.

    Which ``token`` each is, [positions, seq], and its embedding; the last state before the last
    norm, [positions, dim] each; a ``Part`` for each layer; of which tokens each position is made
    in the end, [positions, seq]; and what the output layer reads there, [positions, dim].
    """

    token: Tensor
    first: Tensor
    final: Tensor
    parts: list["Part"]
    mixed: Tensor
    read: Tensor


class Part(NamedTuple):
    """What one layer brought to some positions of a text.

    By ``attention`` with ``rows`` [heads, positions, seq] of its weights, scaled, from ``value``
    [kv heads, seq, head_dim] through ``post``, a norm or none; ``before`` [seq, seq] says of which
    tokens each position was made. And the ``rest`` [positions, dim], of the tokens in ``mixed``
    [positions, seq].
    """

    attention: nn.Module
    rows: Tensor
    value: Tensor
    post: Norm | None
    before: Tensor
    rest: Tensor
    mixed: Tensor


def _run(model, embeds, positions):
    """One forward pass of embeds [1, seq, dim], watched at ``positions``: ``Seen``.

    A layer is taken apart as soon as it has run, so that its maps are not held until the end.
    """
    home = embeds.device  # of layers on several devices
    mixed = torch.eye(embeds.shape[1], device=home)
    token = mixed[positions]
    states: list[Tensor] = []  # [seq, dim] before the layer that runs
    attended: list[tuple[nn.Module, Tensor, Tensor]] = []  # in it, its weights and its values
    passed: list[tuple[nn.Module, Tensor | None, Tensor]] = []  # what its parts were given and gave
    parts: list[Part] = []
    firsts: list[Tensor] = []

    def keep_state(module, args):
        nonlocal mixed
        states.append(args[0][0].float().to(home))
        if len(states) == 1:
            firsts.append(states[0][positions])
            return
        before, after = states
        (attention, weights, value) = attended.pop()
        layer = _taken_apart(model, attention, before, after, passed)
        weights = weights * layer.scale
        blocks, bias = _blocks(model, attention, len(weights))
        carried = torch.einsum("hsw,dhw->hsd", _by_head(value, weights), blocks)
        if layer.post is not None:
            gain = layer.post.gain.to(home)
            carried, bias = layer.post.centre(carried) * gain, layer.post.centre(bias) * gain
        shares, brought = _shares(before, weights, carried)
        found = (brought + layer.scale * bias)[positions]
        _near(model, found, layer.brought[positions], after[positions])
        rest, earlier = (after - before - brought)[positions], mixed
        mixed = shares @ mixed
        fed = (earlier if layer.parallel else mixed)[positions]
        rows = weights[:, positions]
        parts.append(Part(attention, rows, value, layer.post, earlier, rest, fed))
        del states[0]
        passed.clear()

    def keep_part(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        given = args[0] if args else None
        passed.append((module, given, out.reshape(1, -1, out.shape[-1])))

    def keep_weights(module, query, key, value, mask, **options):
        weights = attention_weights(query, key, mask, **options)[0].to(home)
        attended.append((module, weights, value[0].float().to(home)))
        return sdpa(module, query, key, value, mask, **options)

    layers, norm = stack_of(model)
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(keep_state))
            for part in layer.children():
                hooks.enter_context(part.register_forward_hook(keep_part))
        hooks.enter_context(norm.register_forward_pre_hook(keep_state))
        hooks.enter_context(attending(model, keep_weights))
        with torch.inference_mode():
            read = last_states(model, embeds)[0].to(home)[positions]
    # not an inference tensor any more
    return Seen(token, *firsts, states[0][positions], parts, mixed[positions], read.clone())


def _parts(model: Any, seen: Seen, directions: Tensor) -> Tensor:
    """What each token of one text put into the states that ``seen`` read: [positions, seq].

    Each is read by one of ``directions`` [positions, dim].
    """
    norm = places_of(model).norms[stack_of(model).norm]
    constant = (directions * norm.bias.to(directions.device)).sum(dim=1, keepdim=True)
    directions = norm.centre(directions * norm.slope(norm.centre(seen.final)))
    own = (seen.first * directions).sum(dim=1, keepdim=True)
    scores = constant * seen.mixed + own * seen.token
    for part in seen.parts:
        read = directions
        if part.post is not None:
            read = part.post.centre(directions * part.post.gain.to(directions.device))
        blocks, _ = _blocks(model, part.attention, len(part.rows))
        read = torch.einsum("od,dhw->ohw", read, blocks)
        read = torch.einsum("ohw,hsw->ohs", read, _by_head(part.value, part.rows))
        from_each = (part.rows.transpose(0, 1) * read).sum(dim=1)  # [positions, seq]
        scores = scores + from_each @ part.before
        scores = scores + (part.rest * directions).sum(dim=1, keepdim=True) * part.mixed
    return scores


class Layer(NamedTuple):
    """How a layer adds to the stream: ``scale`` [seq, 1] times what ``post``, a norm, makes of it.

    ``brought`` [seq, dim] is what attention added; ``parallel`` says whether the feed-forward reads
    what attention read, and not what it added as well.
    """

    scale: Tensor
    post: Norm | None
    brought: Tensor
    parallel: bool


def _taken_apart(model, attention, before, after, passed):
    """``Layer``, from the parts that were run between two states of the stream."""
    norms = places_of(model).norms

    def numbers(some):
        return some[0].to(before)

    def behind(out):
        """What a norm made of it, and that norm; some have none."""
        for part, given, made in passed:
            if part in norms and _same(given, out):
                return numbers(made), norms[part]
        return numbers(out), None

    parts = [each for each in passed if each[0] not in norms and not _same(each[1], each[2])]
    own = [each for each in parts if attention in each[0].modules()]
    others = [each for each in parts if attention not in each[0].modules()]
    if len(own) != 1 or not others or others[-1][1] is None:
        raise _otherwise(model, "they are no attention and feed-forward")
    heads, (_, given, fed) = own[0][2], others[-1]
    (brought, post), (fed, _) = behind(heads), behind(fed)
    both = brought + fed.view_as(brought)
    times = (after - before).mul(both).sum() / both.square().sum()  # Granite scales what is added
    _near(model, times * both, after - before, after)
    read = next((given for _, given, made in passed if _same(made, others[-1][1])), given)
    scale = times.expand(len(before), 1)
    if post is not None:
        scale = scale * post.scale(post.centre(numbers(heads)))
    read = numbers(read)  # of the last layer maybe the end alone
    parallel = torch.equal(read, before[-len(read) :])
    return Layer(scale, post, times * brought, parallel)


def _same(some, other):
    return some is not None and some.data_ptr() == other.data_ptr() and some.shape == other.shape


def _near(model, found, expected, stream):
    """Refuse what misses more than rounding would, in a stream of such numbers: [seq, dim] each."""
    share, rounding = _tolerance(model)
    most = share * expected.norm(dim=1) + 4 * rounding * stream.norm(dim=1)
    if ((found - expected).norm(dim=1) > most).any():
        raise _otherwise(model, "one adds something else to the stream than its parts do")


def _blocks(model, attention, heads):
    """What reads each head, [dim, heads, head_dim], and its bias, [dim] or [1]."""
    projection = output_projection(attention)
    if projection is None:
        raise _otherwise(model, "what comes out of an attention goes through no plain matrix")
    with align_module_device(projection):  # what is offloaded comes for as long
        home = model.get_input_embeddings().weight.device
        weight, bias = projection.weight.detach().float().to(home), projection.bias
        bias = weight.new_zeros(1) if bias is None else bias.detach().float().to(home)
    weight = weight.T if isinstance(projection, Conv1D) else weight
    return weight.reshape(len(weight), heads, -1), bias


def _by_head(value, weights):
    """Values [kv heads, seq, head_dim] as [heads, seq, head_dim], as many as ``weights`` has."""
    return value.repeat_interleave(len(weights) // len(value), dim=0)


def _shares(states, weights, carried):
    """ALTI: how much of each position, after attention, came from each one before: [seq, seq].

    ``states`` [seq, dim] went in. A share is how much the L1 norm of a sum falls short of the
    distance between the sum and one of its terms; never below zero, and a row sums to 1. Where the
    terms cancel so far that none comes nearer to their sum, the paper has no share to give: the
    position keeps all. Also returns what attention brought to each position, [seq, dim].
    """
    seq, dim = states.shape
    shares, brought = [], []
    for some in torch.arange(seq, device=states.device).split(
        max(1, VECTORS_AT_ONCE // seq // dim)
    ):
        end = int(some[-1]) + 1  # nothing comes from behind
        moved = torch.einsum("hij,hjd->ijd", weights[:, some, :end], carried[:, :end])
        brought.append(moved.sum(dim=1))
        moved[range(len(some)), some] += states[some]  # the residual connection
        total = moved.sum(dim=1, keepdim=True)
        nearer = total.abs().sum(dim=-1) - moved.sub_(total).abs_().sum(dim=-1)  # [some, end]
        shares.append(F.pad(nearer.clamp_min(0), (0, seq - end)))
    shares = torch.cat(shares)
    whole, own = shares.sum(dim=-1, keepdim=True), torch.eye(seq, device=shares.device)
    return torch.where(whole > 0, shares / whole.clamp_min(1e-12), own), torch.cat(brought)
