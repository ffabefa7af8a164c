"""Figures: each function draws on the ``ax`` it is given and returns it.

Importing this module gives matplotlib one style for all figures, ``data/house.mplstyle``. Signed
scores use one diverging, colour-blind-safe map centred at 0, weights one sequential map.
Sign never rests on colour alone: bars point left or right, and cells carry a number or hatching.
Tokens are drawn as text, never as markup, and of a long one the beginning.
"""

import io
import json
import logging
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython.display import Image, display
from matplotlib import font_manager
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

DIVERGING = "RdBu_r"  # red pushes the answer up, blue pushes it down
SEQUENTIAL = "cividis"
LINE = 72  # characters of running text
LONGEST = 32  # characters of a label

_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
# Drawn with the first of these that is installed and has the character.
_FONTS = [
    "DejaVu Sans Mono",
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Emoji",
    "Arial Unicode MS",
    "WenQuanYi Zen Hei",
]
_FONTS = [name for name in _FONTS if name in _INSTALLED]
plt.style.use(Path(__file__).parent / "data" / "house.mplstyle")
plt.rcParams["font.family"] = ["sans-serif", *_FONTS]  # a title may hold a token, too
# Some have one weight only, which is told in every figure, whether a character needs them or not.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
Labels = Sequence[str]
_VISIBLE = {" ": "\N{OPEN BOX}", "\n": "↵", "\t": "⇥", "\r": "←"}


def token_text(
    ax: Any,
    labels: Labels,
    scores: Any,
    *,
    signed: bool = True,
    limit: float | None = None,
) -> Any:
    """The prompt as running text, each token on a background that shows its score.

    ``labels`` holds seq strings and ``scores`` seq numbers. Up to 60 tokens also show the number;
    beyond that, strong negative scores are hatched. ``limit`` is the score at full colour, by
    default the largest magnitude.
    """
    scores = np.asarray(scores, dtype=float)
    faces, top = _colours(scores, signed, limit)
    numbers = len(labels) <= 60
    line_height = 2.0 if numbers else 1.3
    centred = {"ha": "center", "va": "center", **_literal()}
    x, y = 0.0, 0.0
    for label, score, face in zip(labels, scores, faces, strict=True):
        text = _drawn(label)
        below = f"{score:+.2f}" if signed else f"{score:.2g}"
        width = max(len(text), len(below) * 0.9 if numbers else 0) + 0.8
        if x and x + width > LINE:
            x, y = 0.0, y - line_height
        hatch = "///" if signed and not numbers and score < -top / 4 else None
        ax.add_patch(Rectangle((x, y - 0.5), width, 1, fc=face, ec="white", hatch=hatch))
        centre = x + width / 2
        ax.text(centre, y, text, color=_ink(face), size=9, **centred)
        if numbers:
            ax.text(centre, y - 0.85, below, color="0.3", size=8, **centred)
        x += width
    ax.set(xlim=(0, LINE), ylim=(y - 1.4, 0.7))
    ax.axis("off")
    lines = 1 - y / line_height
    ax.figure.set_size_inches(9, 0.6 + lines * (0.5 if numbers else 0.3))
    return ax


def token_bars(
    ax: Any,
    labels: Labels,
    scores: Any,
    *,
    errors: Any = None,
    signed: bool = True,
    most: int = 24,
    value: str = "{:+.2f}",
) -> Any:
    """One horizontal bar a token, in the order of the prompt, with its number.

    ``errors`` [seq], if given, are drawn as error bars to both sides.

    A prompt of more than ``most`` tokens shows the ``most`` with the largest scores, each with its
    position.
    """
    scores = np.asarray(scores, dtype=float)
    shown = largest(scores, most)
    place = "  ({})" if len(shown) < len(scores) else ""
    names = [_drawn(labels[i]) + place.format(i) for i in shown]
    _leave_room(ax.figure)
    bars = ax.barh(
        range(len(shown)),
        scores[shown],
        xerr=None if errors is None else np.asarray(errors, dtype=float)[shown],
        color=_colours(scores, signed)[0][shown],
        edgecolor="0.3",
        error_kw={"capsize": 3, "elinewidth": 1},
    )
    ax.bar_label(bars, [value.format(s) for s in scores[shown]], padding=3, fontsize=8)
    ax.set_yticks(range(len(shown)), names, **_literal())
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.margins(x=0.18)
    return ax


def heat_map(
    ax: Any,
    values: Any,
    *,
    signed: bool = True,
    limit: float | None = None,
    texts: Any = None,
    label: str = "",
) -> Any:
    """An array [rows, columns] as coloured cells, row 0 on top: seaborn's heat map.

    The centre of cell (i, j) is at x = j + 0.5, y = i + 0.5. What is not a number stays white.
    ``limit`` is the value at full colour, by default the largest magnitude. ``texts`` [rows,
    columns] are written into the cells. ``label`` stands at the colour bar. The axes get no ticks:
    those are the caller's.
    """
    values = np.asarray(values, dtype=float)
    top = _full_colour(values, limit)
    sns.heatmap(
        np.where(np.isfinite(values), values, np.nan),
        ax=ax,
        cmap=DIVERGING if signed else SEQUENTIAL,
        annot=False if texts is None else np.asarray(texts, dtype=object),
        fmt="",
        vmin=-top if signed else 0,
        vmax=top,
        annot_kws={"size": 8, **_literal()},
        linewidths=0.5,
        cbar_kws={"label": label, "pad": 0.02, "aspect": 15},
        xticklabels=False,
        yticklabels=False,
    )
    return ax


def token_matrix(
    ax: Any,
    labels: Labels,
    rows: Any,
    names: Sequence[Any],
    *,
    signed: bool = True,
    most: int = 24,
    value: str = "{:+.2f}",
    limit: float | None = None,
    texts: Any = None,
    label: str = "",
) -> Any:
    """Rows of scores over the same tokens as a grid [len(names), seq] of coloured numbers.

    ``rows`` is an array [len(names), seq]. With more than ``most`` tokens, the columns are those
    with the largest share of any row. Each cell shows its number as ``value`` writes it, or what
    ``texts`` [len(names)][seq] holds. The rest is as in ``heat_map``.
    """
    rows = np.asarray(rows, dtype=float)
    share = np.abs(rows) / np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-12)
    shown = largest(share.max(axis=0), most)
    place = " ({})" if len(shown) < rows.shape[1] else ""
    columns = [_drawn(labels[i]) + place.format(i) for i in shown]
    texts = [[value.format(score) for score in row] for row in rows] if texts is None else texts
    texts = np.asarray(texts, dtype=object)[:, shown]
    _leave_room(ax.figure)
    top = _full_colour(rows, limit)  # of all rows, also where columns are left out
    heat_map(ax, rows[:, shown], signed=signed, limit=top, texts=texts, label=label)
    widest = max(len(text) for text in texts.flat)
    room = 72 * ax.figure.get_figwidth() * ax.get_position().width / len(shown)  # points
    for text in ax.texts:
        text.set_rotation(90 if 5 * widest > room else 0)  # a figure of 8 points is 5 wide
    ax.set_yticks(
        np.arange(len(names)) + 0.5, [_cut(str(name), LINE) for name in names], **_literal()
    )
    ax.set_xticks(np.arange(len(shown)) + 0.5, columns, rotation=45, ha="right", **_literal())
    ax.tick_params(length=0)
    return ax


def shown_units(
    units: Sequence[Any], rows: Any, template: bool = False
) -> tuple[list[str], np.ndarray]:
    """Labels and scores as figures show them: the chat template's units are one last column.

    ``rows`` holds numbers [..., units]. The column ``(template)`` is the sum of all units whose
    part is ``"template"``: hidden, never lost. ``template=True`` shows these one by one. A label of
    more than ``LONGEST`` characters is cut off.

    Returns the labels and an array [..., columns].
    """
    rows = np.asarray(rows, dtype=float)
    hidden = np.array([unit.part == "template" and not template for unit in units], dtype=bool)
    labels = [unit.label for unit, gone in zip(units, hidden, strict=True) if not gone]
    labels = [_cut(name) for name in labels]
    if not hidden.any():
        return labels, rows
    summed = rows[..., hidden].sum(axis=-1, keepdims=True)
    return [*labels, "(template)"], np.concatenate([rows[..., ~hidden], summed], axis=-1)


def readable(label: str) -> str:
    """A token as it can be drawn: its white space made visible, and no character a font lacks.

    A leading space becomes ``␣`` and a line break ``↵``. A control character, or one that no
    installed font can draw, is written as its code point, ``U+4F60``.
    """
    return "".join(_VISIBLE.get(c) or (c if _drawable(c) else f"U+{ord(c):04X}") for c in label)


def _drawn(label):
    """A label as it is drawn: no longer than a figure has room for."""
    return _cut(readable(_cut(label)), LINE)  # code points take more characters


def _cut(label, most=LONGEST):
    return label if len(label) <= most else f"{label[: most - 1]}…"


def largest(scores: Any, most: int) -> np.ndarray:
    """The positions of the ``most`` largest magnitudes, in order of position."""
    scores = np.abs(np.asarray(scores, dtype=float))
    return np.sort(np.argsort(-scores, kind="stable")[:most])


def show_figure(fig: Any, name: str, alt: str, folder: str | Path | None = None) -> None:
    """Show ``fig`` in the notebook with ``alt`` as its alternative text, and save it if wanted.

    With a ``folder`` it is also written there, as ``save_figure`` does.
    """
    # drawing is what takes time, so a saved picture is shown and not drawn again
    picture = save_figure(fig, name, folder)[0].read_bytes() if folder else _png(fig)
    plt.close(fig)
    display(Image(picture, format="png", alt=alt, metadata={"name": name}))


def save_figure(fig: Any, name: str, folder: str | Path) -> tuple[Path, Path]:
    """Write ``fig`` as ``name.png`` and ``name.svg`` in ``folder``; returns the two paths.

    The same figure gives the same bytes: no date is stored in it. The numbers that it plots are
    beside it, in ``name.json``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    png.write_bytes(_png(fig))
    with plt.rc_context({"svg.hashsalt": name}):
        fig.savefig(svg, metadata={"Date": None})
    (folder / f"{name}.json").write_text(json.dumps(plotted_data(fig)), encoding="utf-8")
    return png, svg


def plotted_data(fig: Any) -> list[dict[str, list[float | None]]]:
    """The numbers in a figure, to four digits: for each of its axes a list of each kind of mark.

    ``lines`` and ``points`` hold x and y in turn, ``bars`` the corners and sizes of rectangles,
    ``cells`` the values of heat maps. What is not a number is ``None``. Axes that hold nothing, and
    colour bars, are left out.
    """
    found = []
    for ax in fig.axes:
        if ax.get_label() == "<colorbar>":
            continue
        bars = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        meshes = [some for some in ax.collections if isinstance(some, QuadMesh)]
        others = [some for some in ax.collections if isinstance(some, PathCollection)]
        marks = {
            "lines": [line.get_xydata() for line in ax.lines],
            "points": [np.ma.getdata(some.get_offsets()) for some in others],
            "bars": [[[*bar.get_xy(), bar.get_width(), bar.get_height()] for bar in bars]],
            "cells": [
                *(np.ma.filled(np.ma.asarray(mesh.get_array(), float), np.nan) for mesh in meshes),
                *(np.ma.filled(image.get_array(), np.nan) for image in ax.images),
            ],
        }
        numbers = {kind: _rounded(parts) for kind, parts in marks.items()}
        found.append({kind: values for kind, values in numbers.items() if values})
    return [marks for marks in found if marks]


def _rounded(parts):
    values = [number for part in parts for number in np.asarray(part, dtype=float).ravel()]
    return [float(f"{number:.4g}") if np.isfinite(number) else None for number in values]


def _png(fig):
    picture = io.BytesIO()
    fig.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _colours(scores, signed, limit=None):
    """The colours of an array of scores, [..., 4], and the score at full colour."""
    top = _full_colour(scores, limit)
    map_ = plt.get_cmap(DIVERGING if signed else SEQUENTIAL)
    return map_((scores / top + 1) / 2 if signed else scores / top), top


def _leave_room(figure):
    """Long labels make the picture of a single grid larger, and not the grid smaller."""
    if len(figure.axes) == 1:
        figure.set_layout_engine("none")


def _full_colour(scores, limit):
    """The score at full colour: ``limit``, or the largest magnitude."""
    return limit or max(np.abs(scores[np.isfinite(scores)]).max(initial=0.0), 1e-12)


def _ink(face):
    """Black on light colours, white on dark ones."""
    red, green, blue = face[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def _drawable(character):
    unseen = unicodedata.category(character)[0] in "CZ"  # controls and separators
    return not unseen and any(ord(character) in some for some in _installed_fonts().values())


@cache
def _installed_fonts():
    """``{family: characters}`` of every font in ``_FONTS``."""
    return {name: set(FT2Font(font_manager.findfont(name)).get_charmap()) for name in _FONTS}


def _literal():
    """How a token is drawn as it is: a $ in a prompt is a dollar."""
    return {"fontfamily": _FONTS, "parse_math": False}
