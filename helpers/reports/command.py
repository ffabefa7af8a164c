"""The command line: ``python -m helpers.reports``."""

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from helpers.attribution import METHODS
from helpers.errors import InputError
from helpers.models import BUNDLED
from helpers.reports.gallery import write_index
from helpers.reports.jobs import DEFAULT_NOTEBOOK, plan
from helpers.reports.prompts import check_method
from helpers.reports.run import run_report

DTYPES = ("float32", "bfloat16", "float16", "auto")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main_command(
    prompts: Annotated[Path, typer.Argument(help="YAML list of prompts.", metavar="PROMPTS")],
    out: Annotated[Path, typer.Option(help="Folder for the reports.")] = Path("outputs/reports"),
    model: Annotated[str, typer.Option(help="Bundled, hub or folder model.")] = BUNDLED,
    notebook: Annotated[
        str, typer.Option(help="Notebook to run: a name, or a path to an .ipynb file.")
    ] = DEFAULT_NOTEBOOK,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Only this method (repeatable): {', '.join(METHODS)}.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
):
    """Execute a notebook over every prompt of a file: one report each, and an index of them all.

    An entry of PROMPTS is a text, or a mapping with "prompt" and, as wanted, "id", "target",
    "foil", "chat", "evidence" (a word that must matter), "methods" and "notebook". The whole
    file is checked before anything runs. A report that fails is kept and listed, the others go on,
    and the exit status is 1.
    """
    try:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES)}.")
        for name in method or []:
            check_method(name)
        jobs = plan(prompts, model=model, notebook=notebook, methods=method or (), dtype=dtype)
        failed = _run_all(jobs, out, model)
    except InputError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"Error: {error.strerror or error}: {error.filename or out}", err=True)
        raise typer.Exit(2) from None
    if failed:
        raise typer.Exit(1)


def _run_all(jobs, out, model):
    """Run every job, print what came of it, and return how many failed."""
    done, interrupted = [], False
    try:
        with tqdm(jobs, unit="report", disable=None) as bar:
            for job in bar:
                bar.set_postfix_str(job.slug[:40])
                done.append(run_report(job, out, model))
    except KeyboardInterrupt:
        interrupted = True
    failed = [facts for facts in done if facts["error"]]
    for facts in failed:
        typer.echo(f"failed: {facts['slug']}: {facts['error'].splitlines()[0]}", err=True)
    if done:
        index = write_index(out)
        typer.echo(f"{len(done) - len(failed)} of {len(jobs)} reports done, {len(failed)} failed.")
        typer.echo(f"Open {index.resolve()}")
    if interrupted:
        typer.echo("Stopped; the reports that were finished are kept.", err=True)
        raise typer.Exit(130)
    return len(failed)


def main():
    app()
