"""Figures: any prompt can be drawn, colours mean what they say, files repeat byte for byte."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.colors import to_rgba
from PIL import Image
from traitlets.config import Config

from helpers.plots import (
    DIVERGING,
    heat_map,
    largest,
    plotted_data,
    readable,
    save_figure,
    show_figure,
    token_bars,
    token_matrix,
    token_text,
)

LABELS = ["The", " capital", " of", " Latvia", " is"]
SCORES = [0.5, -0.25, 0.0, 2.0, -2.0]
AWKWARD = {
    "dollars": ["$x^2$", " costs", " $5", " and $\\frac{1}{2}$", "$$", "\\alpha"],
    "markup": ["<script>alert(1)</script>", "&amp;", "<b>", '"', "'"],
    "white space": ["\n", " \n\n", "\t", "\r", "  ", ""],
    "control characters": ["\x00", "\x1b[31m", "\u200d", "\ufeff", "\ud83d"],
    "emoji": [" 🏰", "👩‍👩‍👧[1/3]", "🇱🇻"],
    "Chinese": ["拉脱", "维亚[1/2]", "？"],
    "Arabic": ["عاصمة", " لاتفيا"],
    "nothing any font has": ["\U0010ffff", "\ue000", "𓀀"],
    "300 tokens": [f" word{i}" for i in range(300)],
    "one token": ["R"],
}


@pytest.fixture
def ax():
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def draw_bars(ax, labels, scores, **options):
    return token_bars(ax, labels, scores, **options)


def draw_text(ax, labels, scores, **options):
    return token_text(ax, labels, scores, **options)


def draw_matrix(ax, labels, scores, **options):
    rows = np.stack([scores, np.flip(scores)])
    return token_matrix(ax, labels, rows, ["saliency", "occlusion"], **options)


every_figure = pytest.mark.parametrize("draw", [draw_bars, draw_text, draw_matrix])


def texts(ax):
    labels = [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
    return [label.get_text() for label in labels]


@every_figure
@pytest.mark.parametrize("signed", [True, False])
def test_a_figure_is_drawn_on_the_ax_it_was_given(ax, draw, signed):
    before = plt.get_fignums()
    assert draw(ax, LABELS, np.abs(SCORES), signed=signed) is ax
    assert plt.get_fignums() == before  # and no other figure was made


@every_figure
@pytest.mark.parametrize("prompt", AWKWARD)
def test_any_prompt_can_be_drawn_without_a_warning(ax, draw, prompt, tmp_path):
    labels = AWKWARD[prompt]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Glyph 25289 missing from font"
        draw(ax, labels, np.linspace(-1, 1, len(labels)))
        ax.set_title(readable("".join(labels)), parse_math=False)
        save_figure(ax.figure, "figure", tmp_path)


@every_figure
@pytest.mark.parametrize("scores", [[0.0] * 5, [1e-30] * 5, [1e6, -1e6, 0, 1, 2]], ids=str)
def test_scores_of_any_size_can_be_drawn(ax, draw, scores):
    draw(ax, LABELS, scores)
    ax.figure.canvas.draw()


@every_figure
@pytest.mark.parametrize("label", ["x" * 100_000, "\x00" * 100_000], ids=["a word", "controls"])
def test_of_a_label_of_any_length_the_beginning_is_drawn(draw, label, tmp_path):
    figure, ax = plt.subplots()
    draw(ax, [label, *LABELS[1:]], SCORES)
    drawn = [text for text in texts(ax) if text.endswith("…")]
    assert drawn and all(len(text) <= 72 and text[0] in "xU" for text in drawn)
    png, _ = save_figure(figure, "long", tmp_path)
    plt.close(figure)
    assert max(Image.open(png).size) < 2500


def test_a_title_draws_what_any_font_has_and_says_nothing(ax, tmp_path, caplog):
    assert readable("\N{ARC}") == "\N{ARC}"  # which one of the two fonts of matplotlib lacks
    ax.set_title("\N{ARC}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(ax.figure, "figure", tmp_path)
    assert not caplog.records


def test_white_space_is_made_visible():
    assert readable(" Riga\n\t") == "␣Riga↵⇥"
    for label in (" ", "\n", "\t", "\r", "\r\n", "\xa0", "\u3000"):
        assert readable(label).strip(), repr(label)


@pytest.mark.parametrize("label", ["$5", "$x^2$", "<script>", "a_b", "\\alpha", "&amp;", "é"])
def test_what_a_font_can_draw_is_left_literal(label):
    assert readable(label) == label


@pytest.mark.parametrize(
    ("label", "code"), [("\x00", "U+0000"), ("\u200d", "U+200D"), ("\ue000", "U+E000")]
)
def test_what_no_font_can_draw_is_written_as_its_code_point(label, code):
    assert readable(label) == code


@every_figure
def test_a_dollar_is_drawn_as_a_dollar(ax, draw):
    draw(ax, ["$x^2$", "$"], [1.0, -1.0])
    drawn = [t for t in [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts] if "$" in str(t)]
    assert {text.get_text() for text in drawn} == {"$x^2$", "$"}
    assert not any(text.get_parse_math() for text in drawn)


@pytest.mark.parametrize("draw", [draw_bars, draw_matrix])
def test_of_a_long_prompt_the_24_largest_are_shown_with_their_positions(ax, draw):
    scores = np.zeros(300)
    scores[100:124] = np.arange(1, 25) * np.where(np.arange(24) % 2, 1, -1)
    draw_scores = scores if draw is draw_bars else scores + np.flip(scores)
    draw(ax, [f"w{i}" for i in range(300)], draw_scores)
    ticks = ax.get_yticklabels() if draw is draw_bars else ax.get_xticklabels()
    assert len(ticks) == 24
    if draw is draw_bars:
        assert [t.get_text() for t in ticks] == [f"w{i}  ({i})" for i in range(100, 124)]


@pytest.mark.parametrize("draw", [draw_bars, draw_matrix])
def test_of_a_short_prompt_every_token_is_shown_in_order(ax, draw):
    draw(ax, LABELS, SCORES)
    assert [text for text in texts(ax) if text in map(readable, LABELS)] == [
        readable(label) for label in LABELS
    ]


def test_running_text_shows_every_token_of_a_long_prompt(ax):
    labels = AWKWARD["300 tokens"]
    token_text(ax, labels, np.linspace(-1, 1, 300))
    assert [text.get_text() for text in ax.texts] == [readable(label) for label in labels]


def test_the_largest_are_of_either_sign_and_in_order_of_position():
    assert largest([1, -5, 0, 3, -4], 3).tolist() == [1, 3, 4]
    assert largest([1, 1, 1], 2).tolist() == [0, 1]
    assert largest([1, 2], 24).tolist() == [0, 1]


def colours(ax, draw):
    if draw is draw_matrix:
        return [tuple(cell) for cell in ax.collections[0].get_facecolors()[: len(LABELS)]]
    return [to_rgba(patch.get_facecolor()) for patch in ax.patches]


@every_figure
def test_signed_colours_are_centred_at_zero_and_symmetric(ax, draw):
    draw(ax, LABELS, SCORES)
    ax.figure.canvas.draw()  # a heat map takes its colours then
    faces = colours(ax, draw)
    map_ = plt.get_cmap(DIVERGING)
    assert faces[2] == pytest.approx(map_(0.5))  # the neutral colour
    assert faces[3] == pytest.approx(map_(1.0))
    assert faces[4] == pytest.approx(map_(0.0))
    assert faces[0] == pytest.approx(map_(0.625))


@every_figure
def test_the_sign_does_not_rest_on_colour_alone(ax, draw):
    draw(ax, LABELS, SCORES)
    assert {"+2.00", "-2.00"} <= set(texts(ax))


def test_strong_negative_scores_of_a_long_prompt_are_hatched(ax):
    token_text(ax, [f"w{i}" for i in range(100)], [-1.0, 1.0] * 50)
    assert [patch.get_hatch() is not None for patch in ax.patches] == [True, False] * 50


def test_labels_and_scores_of_different_lengths_are_refused(ax):
    with pytest.raises(ValueError, match="zip"):
        token_text(ax, LABELS, SCORES[:-1])


@every_figure
def test_a_figure_is_saved_twice_with_the_same_bytes(draw, tmp_path):
    written = []
    for turn in ("first", "second"):
        figure, ax = plt.subplots()
        draw(ax, [*LABELS[:-1], "<script>$"], SCORES)
        paths = save_figure(figure, "scores", tmp_path / turn / "figures")
        plt.close(figure)
        assert [path.name for path in paths] == ["scores.png", "scores.svg"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    png, svg = written[0]
    assert png.startswith(b"\x89PNG")
    assert b"<script" not in svg.lower()
    assert b"<dc:date>" not in svg


@pytest.fixture
def shell(tmp_path_factory, monkeypatch):
    """What a notebook cell runs in, without a history file."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
    yield InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("save", [True, False], ids=["saved", "only shown"])
def test_a_shown_figure_carries_its_alternative_text_and_is_closed(shell, tmp_path, save):
    figure, ax = plt.subplots()
    token_bars(ax, LABELS, SCORES)
    with capture_output() as shown:
        show_figure(figure, "bars", "Latvia moved it most", tmp_path if save else None)
    (output,) = shown.outputs
    assert "image/png" in output.data
    about = output.metadata["image/png"]
    assert (about["alt"], about["name"]) == ("Latvia moved it most", "bars")
    assert not plt.fignum_exists(figure.number)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == ({"bars.png", "bars.svg", "bars.json"} if save else set())


def test_what_a_figure_plots_is_kept_as_numbers(ax):
    token_bars(ax, LABELS, SCORES)
    ax.plot([1, 2], [3, np.nan])
    ax.scatter([5], [6])
    (marks,) = plotted_data(ax.figure)
    assert marks["bars"][2::4] == SCORES  # of a bar: x, y, width, height
    assert marks["lines"][-4:] == [1, 3, 2, None] and marks["points"] == [5, 6]


def test_a_heat_map_is_its_values_and_its_colour_bar_is_no_part_of_it(ax):
    heat_map(ax, [[1.23456, -2], [np.nan, 0]], label="nats", texts=[["a", "b"], ["c", "d"]])
    assert plotted_data(ax.figure) == [{"cells": [1.235, -2, None, 0]}]
    assert [text.get_text() for text in ax.texts] == ["a", "b", "d"]  # nothing where nothing is
    assert ax.figure.axes[1].get_ylabel() == "nats"
    assert ax.get_ylim() == (2, 0)  # row 0 on top
