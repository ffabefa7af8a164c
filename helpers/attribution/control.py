"""Scores that know nothing: what any method has to beat."""

import torch

from helpers.attribution.result import Attribution


def random(model, question, seed=0):
    """Scores that know nothing, from a seeded normal distribution: what any method has to beat.

    Introduced in notebooks/08_comparison.ipynb.
    """
    generator = torch.Generator().manual_seed(seed)
    return Attribution(torch.randn(question.input_ids.shape[1], generator=generator))
