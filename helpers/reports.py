"""One report a prompt: a notebook of this collection, run by papermill over a list of prompts.

``python -m helpers.reports notebooks/prompts.yml`` executes ``08_comparison`` for every entry and
writes, for each, a folder with the executed notebook, a page that opens without a network, the
scores and the figures; and over all of them ``index.html`` and ``scores.parquet``.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import jinja2
import nbformat
import pandas as pd
import papermill
import typer
import yaml
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr, ValidationError
from slugify import slugify
from tqdm import tqdm

from helpers.attribution import METHODS
from helpers.errors import InputError
from helpers.models import BUNDLED, load_tokenizer, public_name, resolve_model
from helpers.questions import check_question

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
TEMPLATES = Path(__file__).resolve().parent / "templates"
DEFAULT_NOTEBOOK = "08_comparison"
DTYPES = ("float32", "bfloat16", "float16", "auto")
_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


class Entry(BaseModel):
    """One entry of a prompts file. A plain string stands for ``{prompt: that string}``."""

    model_config = ConfigDict(extra="forbid")

    prompt: StrictStr
    id: StrictStr | None = None
    target: StrictStr | None = None
    foil: StrictStr | None = None
    chat: StrictBool = False
    evidence: StrictStr | None = None
    methods: list[StrictStr] | None = None
    notebook: StrictStr | None = None


@dataclass(frozen=True)
class Job:
    """An entry that has passed every check: what to run, and the folder it goes to."""

    slug: str
    prompt: str
    notebook: Path
    parameters: dict


# --- reading and checking ----------------------------------------------------------------------


def read_entries(path):
    """``[(line, number, raw entry)]`` of a YAML list; line and number count from 1.

    Raises ``InputError`` when the file cannot be read or is not a list.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"There is no prompts file {path}: check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    try:
        entries = yaml.safe_load(text)
        nodes = yaml.compose(text, Loader=yaml.SafeLoader)  # the same once more, with line numbers
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(
            f"{path}{where}: this is not YAML ({what}): mind quotes and indentation."
        ) from error
    if not isinstance(entries, list) or not entries:
        raise InputError(
            f"{path} must be a YAML list with at least one prompt, such as:\n"
            '- "The capital city of Latvia is"'
        )
    lines = [node.start_mark.line + 1 for node in nodes.value]
    return list(zip(lines, range(1, len(entries) + 1), entries, strict=True))


def plan(path, *, model=BUNDLED, notebook=DEFAULT_NOTEBOOK, methods=(), dtype="float32"):
    """The jobs that a prompts file asks for, all of them checked before any is run.

    Every entry is checked for its keys, against the tokenizer and context of ``model``, and
    against the parameters of its notebook. Raises one ``InputError`` that names the line of each
    entry that cannot run.
    """
    entries = read_entries(path)
    tokenizer = load_tokenizer(model)
    config = json.loads((resolve_model(model) / "config.json").read_text(encoding="utf-8"))
    context = config.get("max_position_embeddings")
    takes = cache(lambda source: set(papermill.inspect_notebook(_literal(source))))
    jobs, problems = [], []
    questions, slugs = {}, {}  # what was asked, and which folders are taken: the line of each
    for line, number, raw in entries:
        try:
            entry = _parse(raw)
            check_question(
                tokenizer,
                entry.prompt,
                target=entry.target,
                foil=entry.foil,
                chat=entry.chat,
                context=context,
            )
            source = find_notebook(entry.notebook or notebook)
            parameters = _parameters(entry, source, takes(source), list(methods), model, dtype)
            first = questions.setdefault((source, repr(parameters)), line)
            if first != line:
                raise InputError(f"It asks the same as line {first}: remove one.")
            slug = entry.id or _slug(entry.prompt, number, slugs)
            first = slugs.setdefault(slug.lower(), line)
            if first != line:
                raise InputError(f"Its id {slug!r} is that of line {first}: choose another.")
            jobs.append(Job(slug, entry.prompt, source, parameters))
        except InputError as error:
            shown = (raw.get("id") or raw.get("prompt")) if isinstance(raw, dict) else raw
            problems.append(f"  line {line}, entry {number} ({str(shown)[:40]!r}): {error}")
    if problems:
        raise InputError(
            f"{path}: {len(problems)} of {len(entries)} entries cannot run, so none was started.\n"
            + "\n".join(problems)
        )
    return jobs


def find_notebook(name):
    """The path of a notebook of this collection by name, or of any notebook by path."""
    given = Path(name)
    known = sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb"))
    path = given if given.suffix == ".ipynb" else NOTEBOOKS / f"{name}.ipynb"
    if not path.is_file() or (given.suffix != ".ipynb" and name not in known):
        raise InputError(f"There is no notebook {name!r}: choose from {', '.join(known)}.")
    return path.resolve()


def _parse(raw):
    """The entry behind one element of the list, or an ``InputError`` that says what is wrong."""
    if isinstance(raw, str):
        raw = {"prompt": raw}
    if not isinstance(raw, dict):
        raise InputError(
            f"An entry is text or a mapping, and YAML reads this as {type(raw).__name__}: put the "
            "prompt in quotes."
        )
    try:
        entry = Entry.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "missing":
            raise InputError(f"The key {key!r} is missing.") from None
        if first["type"] == "extra_forbidden":
            known = ", ".join(Entry.model_fields)
            raise InputError(f"The key {key!r} is unknown: use {known}.") from None
        raise InputError(f"The value of {key!r} will not do: {first['msg'].lower()}.") from None
    for method in entry.methods or []:
        _check_method(method)
    if entry.evidence is not None and entry.evidence.strip() not in entry.prompt:
        raise InputError(
            f"The evidence {entry.evidence!r} is not in the prompt: write it as it stands there."
        )
    if entry.id is not None and not _SLUG.fullmatch(entry.id):
        raise InputError(
            f"The id {entry.id!r} cannot name a folder: use up to 80 letters, digits, '.', '_' and "
            "'-', and begin with a letter or digit."
        )
    return entry


def _check_method(method):
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")


def _parameters(entry, notebook, takes, methods, model, dtype):
    """What papermill passes to ``notebook``, which ``takes`` these; else an ``InputError``."""
    if "prompt" not in takes:
        raise InputError(f"The notebook {notebook.stem} takes no prompt, so it cannot be a report.")
    wanted = {
        "target": entry.target,
        "foil": entry.foil,
        "chat": entry.chat,
        "evidence": entry.evidence,
        "methods": entry.methods or methods,
    }
    parameters = {"prompt": entry.prompt}
    for name, value in wanted.items():
        if not value:
            continue
        if name not in takes:
            raise InputError(f"The notebook {notebook.stem} has no parameter {name!r}: drop it.")
        parameters[name] = value
    # "." since the kernel runs inside the report's folder: no path of this machine is recorded
    settings = {"model_name": str(model), "dtype": dtype, "output_dir": "."}
    if Path(model).expanduser().is_dir():
        settings["model_name"] = str(Path(model).expanduser().resolve())
    return parameters | {name: value for name, value in settings.items() if name in takes}


def _slug(prompt, number, taken):
    """A folder name that reads like the prompt; numbered where two prompts would read the same."""
    slug = slugify(prompt, max_length=60, word_boundary=True) or f"prompt-{number}"
    return f"{slug}-{number}" if slug in taken else slug


# --- running -----------------------------------------------------------------------------------


def run_report(job, out, model=BUNDLED):
    """Execute one job and move its finished folder to ``out/<slug>``; returns the folder's facts.

    A notebook that fails leaves the same folder, with the notebook up to its error and the error
    in ``report.json``; nothing is raised for it. The folder is made elsewhere and moved when
    whole, so a reader never finds half of one.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as work:
        work = Path(work)
        error = None
        try:
            report = _without_lessons(job.notebook, work / "report.ipynb")
            papermill.execute_notebook(
                _literal(report),
                _literal(report),
                parameters=job.parameters,
                kernel_name="python3",
                cwd=str(work),
                progress_bar=False,
                # only a real error is worth a line between the progress bar's
                extra_arguments=["--log-level=ERROR"],
            )
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except DeadKernelError:
            error = "The kernel died, most often for lack of memory: try a shorter prompt."
        facts = {
            "slug": job.slug,
            "prompt": job.prompt,
            "notebook": job.notebook.stem,
            "model": public_name(model),
            "error": error and error[:2000],
            "seconds": round(time.perf_counter() - started, 2),
        }
        _finish(work, facts)
        _move_into_place(work, out / job.slug)
    return facts


def _without_lessons(notebook, copy):
    """Write ``notebook`` to ``copy`` without its exercises, which a report need not run or show."""
    nodes = nbformat.read(notebook, as_version=4)
    lessons = {"not-in-report", "solution"}
    nodes.cells = [c for c in nodes.cells if not lessons & set(c.metadata.get("tags", []))]
    nbformat.write(nodes, copy)
    return copy


def _finish(work, facts):
    """Complete a report's folder: figures in their own, no local paths, the page, the facts."""
    figures = work / "figures"
    figures.mkdir()
    for file in [*work.glob("*.png"), *work.glob("*.svg")]:
        file.rename(figures / file.name)
    notebook = nbformat.read(work / "report.ipynb", as_version=4)
    _forget_local_paths(notebook, work, facts)
    nbformat.write(notebook, work / "report.ipynb")
    (work / "report.html").write_text(_page(notebook, facts), encoding="utf-8")
    (work / "report.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _forget_local_paths(notebook, work, facts):
    """Keep the home folder, and so the user's name, out of what may be passed on."""
    about = notebook.metadata.get("papermill", {})
    about.update(input_path=f"{facts['notebook']}.ipynb", output_path="report.ipynb")
    about.pop("environment_variables", None)
    hidden = {str(work): ".", str(NOTEBOOKS.parent): "…", sys.prefix: "…", str(Path.home()): "~"}

    def clean(value):
        if isinstance(value, str):
            for path, shown in hidden.items():
                value = value.replace(path, shown)
        elif isinstance(value, list):
            value = [clean(item) for item in value]
        elif isinstance(value, dict):
            value = {key: clean(item) for key, item in value.items()}
        return value

    about["parameters"] = clean(dict(about.get("parameters", {})))
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = clean(cell.source)
        for output in cell.get("outputs", []):
            output.update(clean(dict(output)))


def _page(notebook, facts):
    """The notebook as one HTML page: no script, nothing fetched, the code folded away."""
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
    )  # what an output may hold as HTML is harmless here: the template's policy lets no script run
    defaults = TagRemovePreprocessor(remove_cell_tags={"parameters"})  # injected ones are shown
    exporter.register_preprocessor(defaults, enabled=True)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    page, _ = exporter.from_notebook_node(notebook, {"report": {**facts, "style": style}})
    return page


def write_index(out):
    """Write ``index.html`` and ``scores.parquet`` over every report folder in ``out``."""
    out = Path(out)
    reports, scores = [], []
    for file in sorted(out.glob("*/report.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        folder = file.parent
        figures = {figure.name for figure in folder.glob("figures/*.png")}
        preferred = [f for f in ("matrix_signed.png", *sorted(figures)) if f in figures]
        reports.append(
            {
                **facts,
                **_read_json(folder / "provenance.json", ("target", "foil")),
                "evidence": _read_evidence(folder / "evidence.csv"),
                "figure": preferred[0] if preferred else None,
            }
        )
        if (folder / "scores.csv").exists():
            table = _read_table(folder / "scores.csv")
            scores.append(table.assign(slug=facts["slug"]))
    if scores:
        _write_whole(out / "scores.parquet", pd.concat(scores, ignore_index=True).to_parquet())
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    templates.filters["repr"] = repr  # a token in quotes, so that a space or line break is seen
    page = templates.get_template("index.html.j2").render(
        reports=sorted(reports, key=lambda report: (report["error"] is None, report["slug"])),
        failed=sum(report["error"] is not None for report in reports),
        scores=bool(scores),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
    )
    _write_whole(out / "index.html", page.encode("utf-8"))
    return out / "index.html"


def _read_table(path):
    """A CSV as it was written: a token that reads ``NA`` is text, not a missing number."""
    numbers = ("gap", "sum of scores", "beats_random", "evidence_rank")
    return pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in numbers})


def _read_evidence(path):
    if not path.exists():
        return []
    rows = _read_table(path).to_dict("records")
    return [
        {
            "method": row["method"],
            "token": str(row["strongest token"]),
            "gap": _number(row["gap"]),
            "closed": row["closed"],
            "beats_random": _number(row.get("beats_random")),
            "rank": _number(row.get("evidence_rank")),
            "seconds": _number(row.get("seconds")),
        }
        for row in rows
        if row["method"] != "random"
    ]


def _number(value):
    return None if pd.isna(value) else float(value)


def _read_json(path, keys):
    if not path.exists():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    return {key: known.get(key) for key in keys}


def _move_into_place(folder, final):
    """Replace ``final`` by the finished ``folder``; the old one goes only once the new is there."""
    old = final.with_name(f".old-{final.name}")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    folder.rename(final)
    folder.mkdir()  # what TemporaryDirectory will remove
    final.chmod(0o755)  # a temporary folder is private
    shutil.rmtree(old, ignore_errors=True)


def _write_whole(path, content):
    """Write beside ``path`` and rename, so that a reader finds the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _literal(path):
    """A path as papermill takes it: it fills ``{name}`` in paths, so braces are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")


# --- the command line --------------------------------------------------------------------------

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
            _check_method(name)
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


if __name__ == "__main__":
    main()
