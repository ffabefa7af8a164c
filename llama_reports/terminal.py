"""What a terminal is shown: a summary as coloured text, in which no character acts."""

from rich.console import Console
from rich.text import Text

from helpers.summary import NOT_WRITTEN, Summary, shades
from llama_reports.pages import shown

CONTROLS = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)  # a terminal may act on these as on escape
UP, DOWN = (224, 74, 40), (40, 110, 230)  # as on the page: red for the answer, blue against it


def print_summary(summary: Summary, console: Console | None = None) -> None:
    """Print the question, the answer, the coloured prompt and what was found of it.

    Where the output is no terminal, or ``NO_COLOR`` is set, the text has no colours. A character
    that a terminal would act on is shown as the picture of itself.
    """
    console = console or Console(highlight=False)

    def line(text="", style=""):
        console.print(Text(_inert(text), style), soft_wrap=True)

    line(summary.heading, "bold")
    line(summary.answered)
    line()
    console.print(_prompt(summary), soft_wrap=True)
    line()
    for number, sentence in enumerate(summary.removed, 1):
        line(f"{number}. {sentence}" if number <= len(summary.strongest) else sentence)
    told, colour = summary.verdict, {"yes": "green", "weak": "yellow", "no": "red"}
    text = Text(told, f"bold {colour[summary.borne_out]}")
    console.print(text, Text(_inert(" ".join(summary.trust))), soft_wrap=True)
    for note in summary.question.notes:
        line(f"Note: {note}", "yellow")


def _inert(text):
    return shown(text).translate(CONTROLS)


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
        if place in summary.strongest and unit.part not in NOT_WRITTEN:
            number = f"[{summary.strongest.index(place) + 1}]"
        text.append(_inert(unit.label) + number, style)
    return text
