"""What both tables that compare methods share: rules of relevance by name, and exact Shapley."""

from typing import Any

EXACT = 8  # units of which all subsets are run
# Options in full, so that a name means the same whatever ``relevance`` does by default. The fourth,
# CP-LRP on the difference, is that default.
RELEVANCE: dict[str, tuple[str, dict[str, Any]]] = {
    "AttnLRP, as published": ("relevance", {"through_attention": True, "baseline": "zero"}),
    "CP-LRP, as published": ("relevance", {"through_attention": False, "baseline": "zero"}),
    "AttnLRP, on the difference": ("relevance", {"through_attention": True, "baseline": "mean"}),
}


def shapley_options(units: int, rows: int, exact: int = EXACT) -> dict[str, Any]:
    """Orders that take about ``rows``; on prompts of at most ``exact`` units, all subsets."""
    if units <= exact:
        rows = 2**units - 1
    orders = -(-(rows - 1) // max(1, units - 1))  # each is units - 1 rows, beside the empty one
    return {"permutations": max(4, orders + orders % 2)}
