"""From entries to jobs: every check that needs no model, before anything is run."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import papermill
from slugify import slugify

from helpers.errors import InputError
from helpers.models import BUNDLED, load_tokenizer, resolve_model
from helpers.questions import check_question
from helpers.reports.prompts import parse_entry, read_entries

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
DEFAULT_NOTEBOOK = "08_comparison"


@dataclass(frozen=True)
class Job:
    """An entry that has passed every check: what to run, and the folder it goes to."""

    slug: str
    prompt: str
    notebook: Path
    parameters: dict


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
    takes = cache(lambda source: set(papermill.inspect_notebook(literal(source))))
    jobs, problems = [], []
    questions, slugs = {}, {}  # what was asked, and which folders are taken: the line of each
    for line, number, raw in entries:
        try:
            entry = parse_entry(raw)
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


def literal(path):
    """A path as papermill takes it: it fills ``{name}`` in paths, so braces are doubled."""
    return str(path).replace("{", "{{").replace("}", "}}")
