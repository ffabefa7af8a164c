"""Drawings: nothing on them overlaps or is cut off, and the sums on them come out."""

import itertools
import re

import matplotlib.pyplot as plt
import pytest

from helpers import drawings

SIZES = {  # inches, as the notebooks draw them
    "decoder": (7, 5.2),
    "lookup": (8, 4),
    "path": (6, 3.2),
    "relevance_flow": (6, 4),
    "two_runs": (8, 4.2),
    "texts_outputs_units": (8, 4),
}


def drawn(name):
    fig, ax = plt.subplots(figsize=SIZES[name])
    assert getattr(drawings, name)(ax) is ax
    fig.canvas.draw()
    return fig, ax


@pytest.mark.parametrize("name", SIZES)
def test_texts_neither_overlap_nor_leave_the_axes(name):
    fig, ax = drawn(name)
    texts = [text for text in ax.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    for (a, one), (b, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        overlap = one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1
        assert not (overlap and other.y0 < one.y1), (a.get_text(), b.get_text())
    page = ax.get_window_extent()
    assert all(box.x0 > page.x0 - 20 and box.x1 < page.x1 + 60 for box in boxes)
    plt.close(fig)


def test_what_comes_into_a_place_leaves_it():
    fig, ax = drawn("relevance_flow")
    shares = [float(found[1]) for text in ax.texts if (found := _share(text))]
    places, flows = shares[:6], [float(t.get_text()) for t in ax.texts if _number(t)]
    assert places[0] == pytest.approx(sum(places[1:3])) == pytest.approx(sum(places[3:6]))
    assert places[1:3] == pytest.approx(flows[:2])
    assert places[1] == pytest.approx(sum(flows[2:4]))
    assert places[2] == pytest.approx(sum(flows[4:7]))
    plt.close(fig)


def test_the_weights_of_the_lookup_are_a_softmax():
    fig, ax = drawn("lookup")
    told = [re.fullmatch(r"(.+) → (.+)", text.get_text()) for text in ax.texts]
    weights = [float(found[2]) for found in told if found and found[1] != "product"]
    assert len(weights) == 3 and sum(weights) == pytest.approx(1, abs=0.01)
    plt.close(fig)


def _share(text):
    return re.fullmatch(r".+\n(\d\.\d)", text.get_text())


def _number(text):
    return re.fullmatch(r"\d\.\d", text.get_text())
