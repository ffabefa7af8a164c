"""Activation patching: put one hidden state of another run into this one, and see what changes.

Attribution says what an answer goes with. Patching intervenes, so it says what the answer depends
on, given a counterfactual: a prompt of the same length to which the model answers otherwise.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import DynamicCache

from helpers.architectures import stack_of
from helpers.attribution.engine import Asked, asking
from helpers.errors import InputError
from helpers.questions import Question

LEAST_DIFFERENCE = 0.1  # nats: an effect is a share of the difference, and of nothing is noise


@dataclass(frozen=True)
class Patching:
    """What each patch did.

    ``effects``    FloatTensor [layers + 1, seq] on the CPU: 0 where the patch changed nothing, 1
                   where it did as much as the whole prompt; below 0 or above 1 where it pushed the
                   other way or too far; NaN where it was not asked for
    ``clean``, ``corrupted``  the objective of the two prompts, in nats
    ``direction``  ``"restore"`` or ``"destroy"``
    ``forwards``   rows that were run forward, each from the layer of its patch on
    """

    effects: torch.Tensor
    clean: float
    corrupted: float
    direction: str
    forwards: int


def patch_positions(
    model: Any,
    clean: Question,
    corrupted: Question,
    *,
    direction: str = "restore",
    depths: Iterable[int] | None = None,
    positions: Iterable[int] | None = None,
) -> Patching:
    """How much of the answer one hidden state carries, for every depth and position.

    ``clean`` and ``corrupted`` are questions about two prompts of the same number of tokens, with
    the same target and foil. ``effects[depth, position]`` is about the residual stream at one
    position after ``depth`` layers: row 0 is the embedding, the last row the state before the final
    norm. With ``direction="restore"`` the clean run's state is put into the corrupted run, and the
    effect is the share of ``clean - corrupted`` that comes back: is this state enough? With
    ``"destroy"`` the corrupted run's state is put into the clean run, and it is the share that is
    lost: is it needed? ``depths`` and ``positions`` limit what is run, for a long prompt.

    A patch is one more row of a batch, and joins it at its layer: until then it is the run that
    receives it, which is computed once for all. What cannot matter is not run, and its effect is
    exactly 0: positions before the first one that differs (no position sees a later one; both runs
    share their keys and values), embeddings of the same token, and last states that nothing reads.
    The model is left as it was found.

    Raises ``InputError`` for a pair that cannot be patched or that hardly differs, and for an
    unknown direction, depth or position. Sources: Vig et al. 2020, arXiv:2004.12265; Meng et al.
    2022, arXiv:2202.05262; Zhang and Nanda 2024, arXiv:2309.16042; Heimersheim and Nanda 2024,
    arXiv:2404.15255.

    notebooks/12_patching.ipynb takes it apart.
    """
    if direction not in ("restore", "destroy"):
        raise InputError(f"The direction {direction!r} is unknown: use restore or destroy.")
    layers, seq = len(stack_of(model).layers), clean.input_ids.shape[1]
    chosen = _chosen(depths, layers + 1, "depth")
    first = first_difference(clean, corrupted)
    places = _chosen(positions, seq, "position")
    matters = torch.zeros(layers + 1, seq, dtype=torch.bool)
    matters[torch.tensor(chosen)[:, None], torch.tensor(places)] = True
    effects = torch.zeros(layers + 1, seq).where(matters, torch.nan)
    matters[:, :first] = False
    # the same token has the same embedding, and of the last states only the last one is read
    matters[0] &= (clean.input_ids != corrupted.input_ids)[0].cpu()
    matters[-1, :-1] = False
    cells = matters.nonzero().tolist()  # rows join in the order of their layers
    with torch.inference_mode(), asking(model, [clean]) as asked:
        if asked.embeds.shape[1] > 1:
            raise InputError(
                "Patching reads one text, and target and foil are both of several tokens: make one "
                "of them a single token."
            )
        asked.settle()
        # the run that gives states, and the one that gets: [2, length, dim]
        pair = torch.cat([asked.embeds[0], Asked(model, [corrupted]).embeds[0]])
        if direction == "destroy":
            pair = pair.flip(0)
        cache = asked.beginning()[1] if first else None  # what both prompts begin with
        if cache is None:
            first = 0

        def run(some):
            return _objectives(asked, pair[:, first:], some, first, cache)

        given, received = run([]).tolist()
        moved = given - received
        if abs(moved) < LEAST_DIFFERENCE:
            raise InputError(
                f"The two prompts give nearly the same objective, {given:+.2f} and "
                f"{received:+.2f} nats, so there is nothing to explain: choose a "
                "counterfactual that changes the answer, or its answer as the foil."
            )
        # every batch computes the two runs again, at the head of its rows
        length = pair.shape[1] - first
        values = asked.in_batches(lambda some: run(some)[2:].tolist(), cells, length)
    for (depth, position), value in zip(cells, chain(*values), strict=True):
        effects[depth, position] = (value - received) / moved
    whole, other = (given, received) if direction == "restore" else (received, given)
    return Patching(effects, whole, other, direction, 2 + len(cells))


def _objectives(asked, pair, cells, first, cache):
    """The objective of two runs, and of the second with one state from the first: [2 + cells].

    ``pair`` [2, length, dim] are the embeddings of both from position ``first`` on; what stands
    before is the same in both, its keys and values are in ``cache``. ``cells`` are (depth,
    position), depths ascending.
    """
    layers, norm = stack_of(asked.model)
    modules = [*layers, norm]
    by_depth = {0: []}
    for depth, position in cells:
        by_depth.setdefault(depth, []).append(position - first)
    with ExitStack() as hooks:
        for depth, positions in by_depth.items():

            def join(module, args, depth=depth, positions=positions):
                # One row enters the model, so that its mask, if it made one, fits any number.
                states = pair if depth == 0 else args[0]  # [rows so far, length, dim]
                patched = states[1].repeat(len(positions), 1, 1)
                patched[range(len(positions)), positions] = states[0, positions]
                return (torch.cat([states, patched]), *args[1:])

            hooks.enter_context(modules[depth].register_forward_pre_hook(join))
        past = None if cache is None else _shared(cache, first, cells)
        places = asked.positions.expand(2 + len(cells), -1) - first
        options = {} if past is None else {"past_key_values": past, "use_cache": True}
        read, _ = asked.read(pair[:1, None], places, **options)
        return asked.values_of(read)[:, 0]


def _shared(cache, first, cells):
    """The shared beginning, as many times as rows have joined by each layer."""
    past = DynamicCache()
    for index, layer in enumerate(cache.layers):
        rows = 2 + sum(depth <= index for depth, _ in cells)
        both = [some[:, :, :first].expand(rows, -1, -1, -1) for some in (layer.keys, layer.values)]
        past.update(*both, index)
    return past


def causal_scores(effects: torch.Tensor) -> torch.Tensor:
    """One number for each position: its mean effect over the depths before the last. [seq]

    At every depth the answer's information is somewhere; the mean is the share of the way that it
    spends at a position. The maximum would not order positions: it is about 1 for the token that
    was changed and, after the last layer, exactly 1 for the last position, whatever the prompt. For
    that reason too the last depth does not count. Depths that were not run (NaN) do not either.

    notebooks/12_patching.ipynb takes it apart.
    """
    return effects[:-1].nanmean(dim=0)


def first_difference(clean: Question, corrupted: Question) -> int:
    """The first position at which two questions differ; ``InputError`` if they are no pair."""
    seq, other = clean.input_ids.shape[1], corrupted.input_ids.shape[1]
    if seq != other:
        raise InputError(
            f"The prompt has {seq} tokens and its counterfactual {other}: a state is put in at the "
            "same position, so replace words by words of as many tokens."
        )
    if (clean.target, clean.foil) != (corrupted.target, corrupted.foil):
        raise InputError(
            "The two questions ask for different tokens: give both the same target and foil."
        )
    differs = (clean.input_ids != corrupted.input_ids)[0]
    if not differs.any():
        raise InputError("The prompt and its counterfactual are the same: change a word.")
    return int(differs.int().argmax())


def _chosen(indices, size, what):
    """``indices`` sorted, each once; all of them for ``None``."""
    chosen = range(size) if indices is None else sorted(set(indices))
    if not chosen or chosen[0] < 0 or chosen[-1] >= size:
        raise InputError(f"Choose at least one {what}, from 0 to {size - 1}.")
    return list(chosen)
