"""What a terminal is shown: a summary as coloured text, in which no character acts."""

import re
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from helpers.coloured import shades, unit_text

if TYPE_CHECKING:
    from helpers.summary import Summary

# of a terminal, and what turns the direction of a text
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UP, DOWN = (224, 74, 40), (40, 110, 230)  # as on the page: red for the answer, blue against it


def say(text: str, err: bool = False) -> None:
    """Print a text, whatever it quotes: nothing in it can steer the terminal."""
    typer.echo(inert(text), err=err)


def print_summary(summary: "Summary", console: Console | None = None) -> None:
    """Print the question, the answer, the coloured prompt and what was found of it.

    Where the output is no terminal, or ``NO_COLOR`` is set, the text has no colours. A character
    that a terminal would act on is written as its escape.
    """
    console = console or Console(highlight=False)

    def line(text="", style=""):
        console.print(Text(inert(text), style), soft_wrap=True)

    line(summary.heading, "bold")
    line(summary.answered)
    line()
    console.print(_prompt(summary), soft_wrap=True)
    line()
    for number, sentence in enumerate(summary.removed, 1):
        line(f"{number}. {sentence}" if number <= len(summary.strongest) else sentence)
    if summary.question.options:
        console.print(_options(summary))
    told, colour = summary.verdict, {"yes": "green", "weak": "yellow", "no": "red"}
    text = Text(told, f"bold {colour[summary.borne_out]}")
    console.print(text, Text(inert(" ".join(summary.trust))), soft_wrap=True)
    for note in summary.notes:
        line(f"Note: {note}", "yellow")


def _options(summary):
    head, *rows = summary.option_rows
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(inert(cell)) for cell in row))
    return table


def inert(text: str) -> str:
    """``text`` with the characters that could steer a terminal written as escapes."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def _prompt(summary):
    """The units that somebody wrote, or the model, on their colours, the strongest with numbers."""
    units = summary.question.units
    parts = [unit.part for unit in units]
    text, part = Text(), "prompt"
    for place, (unit, shade) in enumerate(
        zip(units, shades(summary.scores.numpy(), parts, summary.signed), strict=True)
    ):
        if unit.part == "template":
            continue
        if unit.part != part:
            part = unit.part
            text.append(("\n" if len(text) else "") + f"{part}: ", "dim")
        style = ""
        if shade:
            share = abs(shade) / 10  # from white to the full colour
            red, green, blue = (
                round(255 - share * (255 - level)) for level in (UP if shade > 0 else DOWN)
            )
            style = f"black on rgb({red},{green},{blue})"
        number = ""
        if place in summary.strongest:
            number = f"[{summary.strongest.index(place) + 1}]"
        text.append(inert(unit_text(unit.label)) + number, style)
    return text
