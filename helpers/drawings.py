"""Drawings of what the notebooks explain, made of boxes and arrows: no number in them is measured.

Each function draws on the ``ax`` it is given and returns it, as the functions of ``plots`` do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

STREAM, ATTENTION, FORWARD = "#4C4C4C", "#2166AC", "#B2182B"
PAPER, LIGHT = "white", "#EEEEEE"
FOR, AGAINST = "#D6604D", "#4393C3"  # as in the figures: red for the answer, blue against it


def decoder(ax: Any, words: Sequence[str] = ("The", "city", "is"), answer: str = "Riga") -> Any:
    """A decoder as streams, one a token, to which attention and feed-forward add.

    ``words`` are the tokens that are read. The last stream is read by the output layer.
    """
    last = len(words) - 1
    for column, word in enumerate(words):
        _text(ax, (column, -0.45), word, weight="bold")
        _arrow(ax, (column, -0.2), (column, 4.55 if column == last else 4.2), STREAM, width=3)
    _box(ax, (-0.4, 0.1), last + 0.8, 0.45, LIGHT, "embedding: a row of a table for each token")
    for bottom, colour, label in (
        (1.25, ATTENTION, "attention"),
        (2.75, FORWARD, "feed-\nforward"),
    ):
        for column in range(len(words)):
            left = column + 0.16
            _box(ax, (left, bottom), 0.6, 0.5, PAPER, label, edge=colour, size=8)
            _arrow(ax, (column, bottom - 0.28), (left + 0.3, bottom), colour, bend=0.3)
            _arrow(ax, (left + 0.3, bottom + 0.5), (column + 0.05, bottom + 0.8), colour, bend=0.3)
            _plus(ax, (column, bottom + 0.78), colour)
    for column in range(last):  # what later tokens may look at
        _arrow(ax, (column + 0.76, 1.5), (column + 1.16, 1.5), ATTENTION, style="dashed")
    ax.add_patch(
        Rectangle((-0.45, 0.8), last + 1.35, 2.95, fill=False, ec="0.6", ls=(0, (4, 3)), lw=1)
    )
    _text(
        ax, (last + 0.98, 2.3), "one layer;\nthe next ones\nfollow above", ha="left", color="0.35"
    )
    _box(ax, (last - 0.45, 4.6), 0.9, 0.4, LIGHT, "output layer", size=8)
    _arrow(ax, (last, 5.0), (last, 5.3), STREAM, width=2)
    _text(ax, (last, 5.5), f"logits: “{answer}” before all others", weight="bold")
    return _plain(ax, (-0.6, last + 2.1), (-0.7, 5.75))


def lookup(ax: Any) -> Any:
    """One attention head on three words, with toy numbers: query, key and value as a lookup.

    The numbers are chosen, and worked out in the drawing as a head does: the products of the
    query with the keys, their softmax, and the mix of the values.
    """
    words = ["capital", "of", "Latvia"]
    query, keys = np.array([1.0, 2.0]), np.array([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0]])
    values = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    products = keys @ query
    weights = np.exp(products) / np.exp(products).sum()
    mixed = weights @ values
    _text(ax, (0.55, 3.75), "the last word asks", weight="bold", color=ATTENTION)
    _box(ax, (0.0, 1.15), 1.1, 0.7, PAPER, f"query\n{_numbers(query)}", edge=ATTENTION)
    for row, word in enumerate(words):
        height = 2.6 - 1.2 * row
        _text(ax, (2.55, height + 0.72), f"“{word}”", weight="bold")
        _box(ax, (2.0, height), 1.1, 0.55, PAPER, f"key {_numbers(keys[row])}", size=8)
        _arrow(ax, (1.1, 1.5), (2.0, height + 0.27), ATTENTION)
        told = f"{products[row]:.1f} → {weights[row]:.2f}"
        _text(ax, (3.75, height + 0.27), told, color=ATTENTION)
        _box(ax, (4.4, height), 1.2, 0.55, PAPER, f"value {_numbers(values[row])}", size=8)
        width = 0.5 + 5 * weights[row]
        _arrow(ax, (5.6, height + 0.27), (6.6, 1.5), FORWARD, width=width)
    _text(ax, (3.4, 3.75), "product → weight", color=ATTENTION, weight="bold")
    _text(ax, (5.5, 3.75), "what is handed over", weight="bold", color=FORWARD)
    _box(ax, (6.6, 1.15), 1.3, 0.7, LIGHT, f"mix of values\n{_numbers(mixed)}", edge=FORWARD)
    return _plain(ax, (-0.2, 8.1), (-0.1, 4.0))


def path(ax: Any) -> Any:
    """The way from the baseline to the prompt, its slopes, and where pieces are halved.

    The curve is a made-up objective; the trapezoids under its slope are worked out.
    """
    curve = np.linspace(0, 1, 401)

    def slope(alpha):
        return 0.6 + 3.2 / (1 + np.exp(-26 * (alpha - 0.68))) * (1.25 - alpha)

    points = np.array([0, 0.25, 0.5, 0.625, 0.6875, 0.75, 1])
    ax.fill_between(points, slope(points), color=FOR, alpha=0.25, lw=0)
    ax.plot(curve, slope(curve), color=STREAM, lw=2)
    ax.vlines(points, 0, slope(points), color=FOR, lw=1)
    ax.plot(points, slope(points), "o", color=FOR, ms=5)
    ax.annotate(
        "pieces are halved where\nthe slope bends",
        (0.6875, slope(0.6875)),
        (0.2, 1.75),
        arrowprops={"arrowstyle": "->", "color": "0.3"},
        ha="center",
    )
    ax.set_xticks([0, 0.5, 1], ["baseline\n0", "halfway\n0.5", "prompt\n1"])
    ax.set_ylabel("slope along the way")
    ax.set_title("The area is what the answer gained", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlim=(-0.04, 1.04), ylim=(0, 2.4))
    return ax


def relevance_flow(ax: Any) -> Any:
    """Relevance on its way back: what leaves a place is what came in.

    The shares are chosen and add up at every step, which is what the rules of LRP promise.
    """
    levels = [
        [("logit of the answer", 4.0, 1.5)],
        [("feed-forward", 1.2, 0.3), ("stream", 2.8, 2.7)],
        [("“capital”", 0.9, -0.1), ("“of”", 0.1, 1.5), ("“Latvia”", 3.0, 3.1)],
    ]
    flows = [
        [(0, 0, 1.2), (0, 1, 2.8)],
        [(0, 0, 0.3), (0, 2, 0.9), (1, 0, 0.6), (1, 1, 0.1), (1, 2, 2.1)],
    ]
    for depth, places in enumerate(levels):
        height = 2.6 - 1.25 * depth
        for name, share, x in places:
            _box(ax, (x - 0.55, height), 1.1, 0.5, LIGHT, f"{name}\n{share:.1f}", size=8)
    for depth, some in enumerate(flows):
        top, bottom = 2.6 - 1.25 * depth, 2.6 - 1.25 * (depth + 1) + 0.5
        for start, end, share in some:
            a, b = levels[depth][start][2], levels[depth + 1][end][2]
            _arrow(ax, (a, top), (b, bottom), FOR, width=0.6 + 1.6 * share)
            middle = (0.65 * a + 0.35 * b, 0.65 * top + 0.35 * bottom)  # where none meet
            _text(ax, middle, f"{share:.1f}", size=8, box=True)
    return _plain(ax, (-0.9, 3.9), (-0.1, 3.3))


def two_runs(ax: Any) -> Any:
    """Activation patching: one value of a run is put into another, and the answer is read."""
    for left, words, answer, colour in (
        (0, ("Latvia", "is"), "Riga", FOR),
        (4, ("Estonia", "is"), "Tallinn → Riga?", AGAINST),
    ):
        for column, word in enumerate(words):
            x = left + 1.2 * column
            _text(ax, (x, -0.35), f"“{word}”", weight="bold")
            _arrow(ax, (x, -0.1), (x, 3.3), colour, width=2)
            for depth in range(3):
                _box(ax, (x - 0.28, 0.35 + depth), 0.56, 0.36, PAPER, "", edge=colour)
        _text(ax, (left + 1.2, 3.55), answer, weight="bold")
    _text(ax, (0.6, 4.1), "run 1: as it is", color=FOR)
    _text(ax, (4.6, 4.1), "run 2: with one value of run 1", color=AGAINST)
    _box(ax, (-0.28, 1.35), 0.56, 0.36, FOR, "", edge=FOR)
    _box(ax, (3.72, 1.35), 0.56, 0.36, FOR, "", edge=FOR)
    _arrow(ax, (0.28, 1.6), (3.72, 1.6), FOR, width=2.5, bend=-0.17)
    _text(ax, (2.55, 2.4), "put in its place")
    for depth in range(3):
        _text(ax, (-0.75, 0.53 + depth), f"after\nlayer {depth}", size=7, color="0.4")
    return _plain(ax, (-1.1, 6.4), (-0.6, 4.3))


def texts_outputs_units(ax: Any) -> Any:
    """What an attribution is about: texts that are read, outputs in them, units that get scores."""
    units = ["capital", "Latvia", "is", "Riga", ","]
    outputs = ["“Riga”", "“,”", "“which”"]
    known = [3, 4, 5]
    for row, output in enumerate(outputs):
        _text(ax, (-0.75, -row), output, ha="right", weight="bold")
        for column, _ in enumerate(units):
            face = LIGHT if column < known[row] else PAPER
            ax.add_patch(Rectangle((column - 0.5, -row - 0.4), 1, 0.8, fc=face, ec="0.5"))
            told = "score" if column < known[row] else "not read yet"
            _text(ax, (column, -row), told, size=8, color="black" if told == "score" else "0.5")
    for column, unit in enumerate(units):
        _text(ax, (column, 0.7), unit, weight="bold")
    _text(ax, (1.0, 1.25), "units: of the prompt", color=ATTENTION)
    _text(ax, (3.5, 1.25), "and of the answer so far", color=ATTENTION)
    _text(ax, (-1.75, -1), "outputs:\nthe tokens\nthat are\nexplained", color=FORWARD, ha="right")
    _box(ax, (-0.5, -3.35), 5, 0.5, PAPER, "their sum: one score a unit for the whole answer")
    _arrow(ax, (2, -2.42), (2, -2.83), STREAM, width=2)
    return _plain(ax, (-3.0, 4.7), (-3.5, 1.5))


# --- parts -------------------------------------------------------------------------------------


def _box(ax, corner, width, height, face, text, edge="0.4", size=9):
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, style, fc=face, ec=edge, lw=1.5, zorder=2))
    _text(ax, (corner[0] + width / 2, corner[1] + height / 2), text, size=size)


def _arrow(ax, start, end, colour, width=1.5, bend=0.0, style="solid"):
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=8 + 2 * width,
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            lw=width,
            ls=style,
            shrinkA=0,
            shrinkB=0,
            zorder=1,
        )
    )


def _plus(ax, place, colour):
    ax.plot(*place, "o", ms=11, mfc=PAPER, mec=colour, mew=1.5, zorder=3)
    _text(ax, place, "+", color=colour, weight="bold")


def _text(ax, place, text, size=9, color="black", ha="center", weight="normal", box=False):
    about = {"bbox": {"fc": PAPER, "ec": "none", "pad": 1}} if box else {}
    style = {"size": size, "color": color, "weight": weight, "zorder": 4}
    ax.text(*place, text, ha=ha, va="center", **style, **about)


def _numbers(values):
    return "(" + ", ".join(f"{value:.1f}" for value in values) + ")"


def _plain(ax, across, up):
    ax.set(xlim=across, ylim=up)
    ax.axis("off")
    return ax
