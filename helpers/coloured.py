"""Text for people: words on the colour of their score, and numbers as people write them.

Whatever a prompt holds is shown as text, never as markup. No model is needed.
"""

import html
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from helpers.prompts import SHOWN, shortened

PASSAGE = 5 * SHOWN  # characters of a unit with spaces in it
FEW = 60  # units that are coloured by amount; of more, the strongest quarter by rank
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what bytes decode to that are no whole character
STYLE = Path(__file__).parent / "data" / "summary.css"


def coloured_text(
    labels: Sequence[str],
    scores: Any,
    parts: Sequence[str],
    strongest: Sequence[int] = (),
    *,
    signed: bool = True,
    most: int | None = None,
    anchors: bool = False,
) -> str:
    """The prompt as HTML text, each unit coloured by its score, the ``strongest`` with numbers.

    ``labels``, ``scores`` and ``parts`` hold one value a unit. The template's units are left out;
    who wrote what stands before it. A unit of very many characters is cut: see ``unit_text``. With
    ``most``, of a longer text only about so many characters of and around the strongest units are
    shown, and no other long unit. With ``anchors`` a link reaches the strongest units, as
    ``#strongest-1``.
    """
    faces = shades(np.asarray(scores, dtype=float), parts, signed)
    shown = _around(labels, parts, strongest, most)
    room = None if most is None else most // (len(strongest) + 1)  # characters of one unit
    written, part, gap = [], "prompt", False
    for place, label in enumerate(labels):
        if parts[place] == "template":
            continue
        if not shown[place]:
            gap = True
            continue
        if parts[place] != part:
            part = parts[place]
            written.append(f'<b class="part">{html.escape(part)}</b>')
        if gap:
            written.append('<span class="gap"> … </span>')
            gap = False
        text = unit_text(label, room)
        written.append(_unit(text, faces[place], place, strongest, anchors))
    if gap:
        written.append('<span class="gap"> …</span>')
    # elsewhere than in <pre> a page may lose spaces
    return f'<pre class="coloured" dir="auto">{"".join(written)}</pre>'


def unit_text(label: str, most: int | None = None) -> str:
    """A unit as it is shown, cut after ``most`` characters; it then says how many it has.

    By default 2,000 of a word, which nobody reads to its end, and 10,000 of a passage.
    """
    passage, text = len(label[:SHOWN].split()) > 1, label.rstrip()
    most = most or (PASSAGE if passage else SHOWN)
    return label if len(label) <= most else shortened(text, most) + label[len(text) :][:2]


def _unit(label, shade, place, strongest, anchors):
    text = html.escape(label)
    if place in strongest:
        number = list(strongest).index(place) + 1
        passage, sign = len(label) > FEW, f"<sup>{number}</sup>"
        about = ' class="passage"' if passage else ""
        about += f' id="strongest-{number}"' if anchors else ""
        text = f"{sign}{text}" if passage else f"{text}{sign}"  # of a passage, where it begins
        text = f"<mark{about}>{text}</mark>"
    if not shade:
        return text
    side = "up" if shade > 0 else "down"
    return f'<span class="{side}{abs(shade)}">{text}</span>'


def shades(scores: Any, parts: Sequence[str], signed: bool) -> list[int]:
    """From -10 to 10, one a unit: by amount of a few units, of many the strongest quarter by rank.

    ``scores`` [units] and ``parts`` hold one value a unit. The template's are 0, and none is
    negative where the scores have no sign.
    """
    hidden = np.array([part == "template" for part in parts], dtype=bool)
    sizes = np.where(hidden, 0, np.abs(scores))
    signs = np.sign(scores) if signed else np.ones_like(scores)
    if (~hidden).sum() <= FEW:
        sizes = 10 * sizes / max(sizes.max(initial=0.0), 1e-12)
    else:
        quarter = max(1, int((~hidden).sum()) // 4)
        ranks = np.empty(len(sizes))
        ranks[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
        sizes = np.where(sizes > 0, np.ceil(10 * np.maximum(0, 1 - ranks / quarter)), 0)
    return (signs * np.round(sizes)).astype(int).tolist()


def _around(labels, parts, strongest, most):
    """Which units are shown, where ``most`` characters are: the first, and those around some."""
    lengths = np.array(
        [0 if p == "template" else len(x) for x, p in zip(labels, parts, strict=True)]
    )
    if most is None or lengths.sum() <= most:
        return np.ones(len(labels), dtype=bool)
    ends = lengths.cumsum()
    begins = ends - lengths
    room = most // (2 * (len(strongest) + 1))
    shown = ends <= room
    for place in strongest:
        shown |= (begins < ends[place] + room) & (ends > begins[place] - room)
    shown &= lengths <= 2 * room
    shown[list(strongest)] = True
    return shown


def in_line(output: str) -> str:
    """A token of an answer in a line of text, a break or a blank as a sign that can be chosen."""
    text = output.replace("\n", "↵")
    return text if text.strip() else text.replace(" ", "␣").replace("\t", "⇥")


def quoted(text: str) -> str:
    """A word as people write it: in quotes, without the space before it; a blank as it is."""
    if BROKEN in text and not text.strip(f"{BROKEN} "):
        return "a part of a character"
    text = f"{text.rstrip(BROKEN)}…" if text.endswith(BROKEN) else text  # which goes on
    inner = text.strip() or repr(text)[1:-1]
    return f"“{inner if len(inner) <= FEW else inner[: FEW - 1].rstrip(' .') + '…'}”"


def told_apart(texts: Sequence[str]) -> list[str]:
    """Texts in quotes, as people write them or, where that makes two of them alike, as they are."""
    found = [quoted(text) for text in texts]
    return found if len(set(found)) == len(found) else [repr(text) for text in texts]


def percent(share: float) -> str:
    """A probability in per cent, with as many digits as people read, never parted by a line."""
    if share >= 0.9995:
        return "over 99.9\xa0%" if share < 1 else "100\xa0%"
    if share >= 0.0995:
        return f"{100 * share:.0f}\xa0%"
    if share >= 1e-5:
        return f"{100 * share:.2g}\xa0%"
    return "under 0.001\xa0%"


@cache
def stylesheet() -> str:
    """The style of the first screen, for the light and the dark."""
    return STYLE.read_text(encoding="utf-8")
