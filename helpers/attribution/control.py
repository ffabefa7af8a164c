"""Scores that know nothing: what any method has to beat."""

import torch

from helpers.attribution.engine import Asked
from helpers.attribution.result import Attribution, attribution


def random(asked: Asked, seed: int = 0) -> list[Attribution]:
    """Scores that know nothing, from a seeded normal distribution: what any method has to beat.

    notebooks/08_comparison.ipynb takes it apart.
    """
    found = []
    for row, units in enumerate(asked.units):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(len(units), generator=generator)
        each = torch.randn(asked.outs, len(units), generator=generator) if asked.each else scores
        found.append(attribution(asked, row, each.view(asked.outs, -1), scores=scores))
    return found
