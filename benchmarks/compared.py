"""What the tables that compare methods share: rules of relevance by name."""

from typing import Any

# Options in full, so that a name means the same whatever ``relevance`` does by default. The fourth,
# CP-LRP on the difference, is that default.
RELEVANCE: dict[str, tuple[str, dict[str, Any]]] = {
    "AttnLRP, as published": ("relevance", {"through_attention": True, "baseline": "zero"}),
    "CP-LRP, as published": ("relevance", {"through_attention": False, "baseline": "zero"}),
    "AttnLRP, on the difference": ("relevance", {"through_attention": True, "baseline": "mean"}),
}
