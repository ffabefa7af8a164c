"""The command line: ``llama-reports``, or ``python -m llama_reports``."""

import errno
import signal
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

if find_spec("papermill") is None or find_spec("typer") is None:
    raise SystemExit("Reports need more: pip install 'llama-notebooks[reports]'")

import typer
from typer.core import TyperGroup

from helpers import BUNDLED
from helpers.errors import InputError
from llama_reports import DEFAULT_NOTEBOOK, TIMEOUT
from llama_reports.checked import is_kept
from llama_reports.prompts import open_entries
from llama_reports.terminal import say

# What takes seconds to import, torch above all, is imported where a command comes to need it.

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
REPORTS = "reports"  # the command that needs no name
Model = Annotated[str, typer.Option(help="Bundled, hub name, folder or .gguf.")]
Methods = Annotated[
    list[str] | None, typer.Option(help="Only this method (repeatable); a wrong name lists all.")
]
WeightsDtype = Annotated[Dtype, typer.Option(help="Of the weights; auto: as saved.")]


class _Commands(TyperGroup):
    """What does not begin with the name of a command is a prompts file, or an option of a run."""

    def parse_args(self, ctx, args):
        named = args[:1] and args[0] in self.commands
        return super().parse_args(ctx, args if named else [REPORTS, *args])

    def resolve_command(self, ctx, args):
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == REPORTS else name, command, rest


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)


@app.command(REPORTS)
def main_command(
    prompts: Annotated[
        Path, typer.Argument(help="Prompts: .yml, .csv, .jsonl or .parquet.", metavar="PROMPTS")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("outputs/reports"),
    model: Model = BUNDLED,
    notebook: Annotated[
        str, typer.Option(help="Notebook to run: a name, or a path to an .ipynb file.")
    ] = DEFAULT_NOTEBOOK,
    method: Methods = None,
    dtype: WeightsDtype = "float32",
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes of a Dask cluster here; 0: what is fastest here."),
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler, such as tcp://10.0.0.1:8786.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads a report; last digits depend on it. 1, or with --workers 0 chosen.",
        ),
    ] = None,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="No notebooks: batches, and Parquet in OUT.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a report, and any cell of it, may take.")
    ] = TIMEOUT,
    only: Annotated[
        list[str] | None, typer.Option(help="Only the entry of this id (repeatable).")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Only what failed before.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace reports of another model in OUT.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run, and what it takes.")
    ] = False,
    attempts: Annotated[
        int | None,
        typer.Option("--try", min=1, help="With --dry-run: run so many first, and go by these."),
    ] = None,
) -> None:
    """Execute a notebook over every prompt of a file: one report each, and a gallery of them all.

    An entry of PROMPTS is a text, or a mapping with "prompt" or "messages" and, as wanted, "id",
    "target", "foil", "answer", "options", "units", "sources", "chat", "raw", "evidence", "methods"
    and "notebook": docs/reports.md says what each means. Other keys are carried to the results. The
    whole file is checked before anything runs. What an earlier run has finished is not run again,
    so a run that was stopped goes on where it was. A report that fails is kept and listed, the
    others go on, and the exit status is 1. With --scores-only no report is written: scores and
    evidence go to Parquet files, as docs/scores.md describes.

    "llama-reports plan --help" tells of the command that plans: what methods take on a prompt of
    some length, in time and memory; "ask --help" of the one that asks one question and prints the
    answer; "compare --help" of the one that compares two folders of reports. Prompts files of these
    names are ./plan, ./ask and ./compare.
    """
    given = locals()
    # what batch systems and containers send first
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _refusals(out):
        if workers is not None and scheduler is not None:
            raise InputError("--workers starts a cluster and --scheduler joins one: give one.")
        if attempts is not None and not dry_run:
            raise InputError("--try runs prompts to estimate the others by them: add --dry-run.")
        if scores_only and (only or retry_failed):
            raise InputError("--only and --retry-failed choose reports: drop --scores-only.")
        # what is wrong with the file itself is told at once
        rows = None if is_kept(out, prompts) else open_entries(prompts)
        from llama_reports.all_prompts import run_all

        failed, interrupted = run_all(**given, rows=rows)
    if interrupted:
        say("Stopped. What was finished is kept, and the same command goes on.", err=True)
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


@app.command("ask")
def ask_command(
    prompt: Annotated[str, typer.Argument(help="The text that is asked.")],
    target: Annotated[str | None, typer.Option(help="Why this text comes next.")] = None,
    foil: Annotated[str | None, typer.Option(help="Rather than this text.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="A text to compare (repeatable): why the likeliest, not the next?"),
    ] = None,
    answer: Annotated[
        int | None, typer.Option(min=1, help="Explain an answer of at most so many tokens.")
    ] = None,
    units: Annotated[
        str | None, typer.Option(help="What gets a score: tokens, words, sentences or turns.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the chat template.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the page to this file, too.")] = None,
    model: Model = BUNDLED,
    method: Methods = None,
    dtype: WeightsDtype = "float32",
) -> None:
    """Ask one question: the answer, the words that it hangs on, and whether to believe that.

    The prompt is coloured where the output is a terminal. Without --target and --answer the model's
    own next token is explained. Mind the space: --target " Riga".
    """
    with _refusals(html):
        if html is not None and not html.parent.is_dir():
            raise InputError(f"There is no folder {html.parent} for the page: make it first.")
        from helpers import ask, load_model
        from helpers.summary import default_units, explain
        from llama_reports.files import write_whole
        from llama_reports.pages import summary_page

        loaded, tokenizer = load_model(model, dtype=dtype)
        asked: dict[str, Any] = {"target": target, "foil": foil, "answer": answer, "chat": chat}
        asked["options"] = option or None
        question = ask(loaded, tokenizer, prompt, **asked, units=units or "tokens")
        found = explain(loaded, question if units else default_units(question), method)
        if html is not None:
            write_whole(html, summary_page(found).encode("utf-8"))
    from llama_reports.terminal import print_summary

    print_summary(found)


@app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(help="Folder of reports.")],
    second: Annotated[Path, typer.Argument(help="Another one, with the same ids.")],
    html: Annotated[
        Path | None, typer.Option(help="The page; FIRST/compared.html by default.")
    ] = None,
) -> None:
    """Compare the reports of two folders by id: answers, strongest words, and what moved."""
    with _refusals(html or first):
        from llama_reports.two_runs import compare_runs

        page = compare_runs(first, second, html)
    say(f"Open {page.resolve()}")


@app.command("plan")
def plan_command(
    tokens: Annotated[list[int], typer.Option(help="Length of a prompt in tokens (repeatable).")],
    model: Model = BUNDLED,
    method: Methods = None,
    dtype: WeightsDtype = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute.")] = 1,
) -> None:
    """Say what methods take on a prompt of so many tokens: rows, seconds and memory, by part.

    Nothing is loaded: sizes are read off the headers of the model's files, and the speed of this
    machine is measured in about a second. Each method has what a report's budget gives it. Memory
    is that of one process which does nothing else; seconds are after a first call, without loading.
    """
    with _refusals(model):
        from llama_reports.costs import measure, model_shape, needs

        machine = measure(model_shape(model, dtype), dtype, threads)
        options: dict[str, Any] = {"dtype": dtype, "machine": machine}
        found = [needs(model, length, method, **options) for length in tokens]
    say("\n\n".join([found[0].heading, *(need.text for need in found)]))


@contextmanager
def _refusals(place):
    """What cannot be done is one sentence, and exit status 2."""
    try:
        yield
    except (InputError, OSError) as error:
        say(f"Error: {_told(error, place)}", err=True)
        raise typer.Exit(2) from None


def _told(error, out):
    """Our own error, or a system's, as one sentence."""
    if isinstance(error, InputError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"The disk is full: {out}. What was finished is kept: make room, and run the same "
            "command again."
        )
    return f"{error.strerror or error}: {error.filename or out}"


def main() -> None:
    app()
