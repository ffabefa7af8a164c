"""One question on the command line: what is printed, what is written, and that no text acts."""

import io

import pytest
from rich.console import Console

from helpers import ask
from helpers.summary import explain
from llama_reports.terminal import print_summary


def test_a_question_is_answered_in_plain_text_and_on_a_page(command, tmp_path):
    page = tmp_path / "one.html"
    question = ["The capital city of Latvia is", "--target", " Riga", "--foil", " Tallinn"]
    done = command("ask", *question, "--html", page)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Why “Riga” rather than “Tallinn”?" and "\x1b" not in done.stdout
    assert any(" Latvia[1]" in line for line in lines)
    assert any(
        line.startswith("1. Without “Latvia”, “Riga” against “Tallinn” falls") for line in lines
    )
    text = page.read_text(encoding="utf-8")
    assert '<mark id="strongest-1"> Latvia<sup>1</sup></mark>' in text and "All reports" not in text
    assert "Content-Security-Policy" in text and "<script" not in text


def test_options_are_compared_in_a_table(command):
    cities = [" Tallinn", " Riga", " Vilnius"]
    given = [word for city in cities for word in ("--option", city)]
    done = command("ask", "The capital city of Latvia is", *given, "--method", "occlusion")
    assert done.exit_code == 0, done.stderr
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert lines[0] == ["Why “Riga” rather than “Tallinn”, the next of 3 options?"]
    (head,) = [at for at, line in enumerate(lines) if line[0] == "option"]
    assert [line[0].strip() for line in lines[head + 1 : head + 4]] == [
        "“Riga”",
        "“Tallinn”",
        "“Vilnius”",
    ]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["Hello", "--model", "./no-such-folder"], "There is no model folder"),
        (["Hello there", "--units", "verses"], "There are no units 'verses'"),
        (["  "], "The prompt is empty"),
        (["Hello there", "--target", "a", "--answer", "3"], "not both"),
        (["Hello there", "--option", "a"], "give at least two"),
        (
            ["Hello there", "--html", "/no/such/folder/one.html"],
            "There is no folder /no/such/folder",
        ),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(command, arguments, complaint):
    done = command("ask", *arguments)
    assert done.exit_code == 2 and complaint in done.stderr and not done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_of_a_word_of_any_length_the_beginning_is_printed(long_word):
    model, tokenizer, word = long_word
    file = io.StringIO()
    question = ask(model, tokenizer, f"The {word} is", target=word)
    print_summary(explain(model, question, ["occlusion"]), Console(file=file))
    printed = file.getvalue()
    assert "x" * 2000 + "… (98,000 more characters)" in printed and len(printed) < 10_000


def test_no_character_of_a_prompt_acts_on_the_terminal(tiny):
    question = ask(*tiny, "\x1b[31mred\x1b]0;title\x07 [bold]not bold[/bold]\r\x9b", target="\x1b")
    for colours in (None, "truecolor"):
        file = io.StringIO()
        console = Console(file=file, force_terminal=bool(colours), color_system=colours)
        print_summary(explain(tiny[0], question, ["occlusion"]), console)
        printed = file.getvalue()
        own = printed.replace("\x1b[0m", "")
        for piece in own.split("\x1b")[1:]:  # rich's own: a style and nothing else
            assert piece.startswith("[") and piece[1 : piece.index("m")].replace(";", "").isdigit()
        assert ("\x1b" in printed) == bool(colours)
        assert not {"\x07", "\r", "\x9b"} & set(printed)
