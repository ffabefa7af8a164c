"""Scores without notebooks: prompts attributed in batches, written as partitioned Parquet.

A part is a few hundred prompts. Its files are named by the ids in it, each is whole or absent, and
the last one written is that in ``prompts``: a part without it was not finished, and doing it again
writes the same names. docs/scores.md describes the tables, column by column.
"""

import hashlib
import io
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from helpers.attribution import BUDGET, METHODS, attribute_all
from helpers.errors import InputError
from helpers.models import BUNDLED, load_model
from helpers.provenance import provenance
from helpers.questions import Question, read_question
from llama_reports.files import write_whole
from llama_reports.privacy import private
from llama_reports.run import Job
from llama_reports.versions import code_version

DEFAULT_METHODS = ("relevance", "saliency", "gradient_x_input", "random")
PART = 512  # prompts: some ten thousand scores a method and file, and little lost by a kill
WINDOW = 8 * PART  # prompts sorted by length together, so that a part holds few lengths
SCHEMA_VERSION = "2"
VERSION_KEY = b"llama_notebooks.scores_version"
UNWRITTEN = ("template", "answer")  # parts that no writer of the prompt wrote


def _schema(columns: str) -> pa.Schema:
    """Columns ``name:type`` of one table; ``?`` says that they may be null, an s that they list."""
    fields = []
    for column in columns.split():
        name, kind = column.split(":")
        of = kind.removesuffix("?")
        found = pa.type_for_alias(of.removesuffix("s"))
        fields.append(pa.field(name, pa.list_(found) if of.endswith("s") else found, kind != of))
    return pa.schema(fields, metadata={VERSION_KEY: SCHEMA_VERSION})


SCORES = _schema(
    "id:string output:int32? unit:int32 part:string label:string start:int32 end:int32 "
    "score:float error:float?"
)
EVIDENCE = _schema(
    "id:string outputs:strings? gap:double? closed:bool? largest_error:float? evaluations:int32 "
    "forwards:int32 seconds:double signed:bool strongest:int32 strongest_loss:float? "
    "mean_loss:float? most_loss:float?"
)
PROMPTS = _schema(
    "id:string slug:string prompt:string messages:string? chat:bool units:string tokens:int32 "
    "target_ids:int32s? target:string? target_given:bool foil_ids:int32s? foil:string? "
    "probability:float? top_id:int32? top:string? top_probability:float? notes:strings "
    "methods:strings left_out:strings error:string? model:string weights_sha256:string "
    "code_version:string dtype:string device:string attention_implementation:string torch:string "
    "transformers:string"
)


# --- what is to be done ------------------------------------------------------------------------


def chunks(
    jobs: Iterable[Job],
    size: int = PART,
    window: int = WINDOW,
    done: frozenset[str] | set[str] = frozenset(),
) -> Iterator[list[Job]]:
    """Lists of up to ``size`` jobs from a stream of them, of like length in tokens.

    ``window`` jobs are held at a time and sorted by length. ``done`` are the ids to leave out; they
    are left out of a part that is formed with them, so that a second run over the same jobs forms
    the same parts.
    """
    jobs = iter(jobs)
    while held := list(islice(jobs, window)):
        held.sort(key=lambda job: (job.tokens, job.identity))
        for start in range(0, len(held), size):
            part = [job for job in held[start : start + size] if job.identity not in done]
            if part:
                yield part


def carried_columns(names: Iterable[str]) -> dict[str, str]:
    """The column of ``prompts`` for each name that is carried: ``meta.`` parts it from our own."""
    found: dict[str, str] = {}
    taken = set(PROMPTS.names)
    for name in names:
        column = name
        while column.casefold() in taken:
            column = f"meta.{column}"
        found[name] = column
        taken.add(column.casefold())
    return found


def finished_ids(out: str | Path, carried: Iterable[str] | None = None) -> set[str]:
    """The ids of all prompts that are done in ``out``, those with an error among them: a set.

    Raises ``InputError`` if a table there was written by another version of this one or, where
    ``carried`` names what a run carries, has other columns than that run would write.
    """
    found = set()
    columns = None if carried is None else {*PROMPTS.names, *carried_columns(carried).values()}
    for file in sorted(Path(out).glob("prompts/part-*.parquet")):
        try:
            table = pq.read_table(file, columns=["id"], partitioning=None)
            names = set(pq.read_schema(file).names)
        except (pa.ArrowException, KeyError) as error:
            raise InputError(f"{file} is not one of our tables: move it away.") from error
        written = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
        if written != SCHEMA_VERSION:
            raise InputError(
                f"{file} has scores of version {written}, and this code writes version "
                f"{SCHEMA_VERSION}: choose another folder."
            )
        if columns is not None and names != columns:
            name = min(names ^ columns)
            why = "there and is not carried" if name in names else "carried and not there"
            raise InputError(
                f"All parts of {Path(out)} have the same columns, and {name[:80]!r} is {why}: "
                "choose another folder."
            )
        found.update(table["id"].to_pylist())
    return found


def seconds_of(out: str | Path, ids: Sequence[str]) -> dict[str, float]:
    """``{id: seconds}`` of those of ``ids`` that are done in ``out``: all methods together."""
    found: dict[str, float] = {}
    for file in sorted(Path(out).glob("evidence/method=*/part-*.parquet")):
        columns = {"columns": ["id", "seconds"], "filters": [("id", "in", list(ids))]}
        for row in pq.read_table(file, partitioning=None, **columns).to_pylist():
            found[row["id"]] = found.get(row["id"], 0.0) + row["seconds"]
    return found


def discard_unfinished(out: str | Path) -> None:
    """Remove what a killed run left in ``out``: files of parts that have no row in ``prompts``.

    Nothing that is finished is touched. Call it before a run, never during one: a part that is
    being written is not finished either.
    """
    out = Path(out)
    whole = {file.name for file in out.glob("prompts/part-*.parquet")}
    hidden = out.glob("prompts/.part-*")
    for file in [*out.glob("scores/method=*/*"), *out.glob("evidence/method=*/*"), *hidden]:
        if file.name.startswith((".part-", "part-")) and file.name not in whole:
            file.unlink(missing_ok=True)


# --- doing it ----------------------------------------------------------------------------------


def score_part(
    jobs: Iterable[Job],
    out: str | Path,
    *,
    model: str = BUNDLED,
    dtype: str = "float32",
    methods: Sequence[str] = (),
    each: bool = False,
    threads: int = 1,
) -> dict[str, Any]:
    """Attribute ``jobs`` together and write their part of the tables in ``out``; returns facts.

    A job's own methods, where a job names some, go before ``methods``; where neither names any,
    they are ``DEFAULT_METHODS``, of which those that the model does not support are left out. A
    method that ``BUDGET`` is too small for is left out, prompt by prompt. A prompt that cannot be
    run, or whose scores are not finite, gets its row in ``prompts`` with the error, and the others
    are not held up. ``each`` adds the scores of every output token by itself. The model is loaded
    at the first call in a process and kept. ``threads`` is the number of torch's threads while
    inside.

    The facts are plain values: ``part``, ``prompts``, ``failed``, ``tokens`` (those attributed),
    ``bytes`` on disk, and ``seconds`` by what they were spent on.

    Raises ``InputError`` for a model that cannot be loaded or does not support a method, and the
    error that was met if not one prompt could be run; then nothing was written.
    """
    clock = [time.perf_counter()]
    jobs = list({job.identity: job for job in jobs}.values())
    name = part_name(jobs)
    with ExitStack() as after:
        after.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(threads)
        loaded, tokenizer, origin = _loaded(model, dtype)
        list(attribute_all(loaded, [], methods))  # refuses a method before anything is run
        supported = [name for name in DEFAULT_METHODS if METHODS[name].refusal(loaded) is None]
        clock.append(time.perf_counter())
        asked = [_ask(loaded, tokenizer, job) for job in jobs]
        clock.append(time.perf_counter())
        answers = _answers(loaded, jobs, asked, methods or supported, each)
        clock.append(time.perf_counter())
        told = origin, private(model)
        tables = _tables(tokenizer, jobs, answers, methods or DEFAULT_METHODS, *told)
        written = sum(_write(Path(out, folder, name), table) for folder, table in tables)
        clock.append(time.perf_counter())
    spent = [after - before for before, after in pairwise(clock)]
    done = [answer[0] for answer in answers if not isinstance(answer, Exception)]
    return {
        "part": name,
        "prompts": len(jobs),
        "failed": len(jobs) - len(done),
        "tokens": sum(len(question.labels) for question in done),
        "bytes": written,
        "seconds": dict(zip(("loading", "asking", "attributing", "writing"), spent, strict=True)),
    }


@lru_cache(maxsize=1)
def _loaded(name, dtype):
    """The model, its tokenizer, and the columns that say where its numbers come from."""
    model, tokenizer = load_model(name, dtype=dtype)
    nothing = Question("", torch.zeros(1, 0), [], [], [])  # a prompt's own facts go over its
    origin = provenance(model, nothing, model_name=name) | {"code_version": code_version()}
    return model, tokenizer, origin


def part_name(jobs: Iterable[Job]) -> str:
    """The name of the files that hold a part: the same for the same jobs."""
    ids = "\n".join(sorted(job.identity for job in jobs))
    return f"part-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.parquet"


def _ask(model, tokenizer, job):
    """The question of a job, or the error it met. A target that is not named stays open."""
    try:
        return read_question(tokenizer, **job.asked, model=model)
    except (TypeError, ValueError) as error:  # text that the tokenizer itself chokes on
        return error


def _methods(job, methods):
    return tuple(dict.fromkeys(job.parameters.get("methods") or methods))


def _answers(model, jobs, asked, methods, each):
    """``(question, {method: Attribution})`` of each job, or the error it met."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, (job, question) in enumerate(zip(jobs, asked, strict=True)):
        if isinstance(question, Question):
            groups.setdefault(_methods(job, methods), []).append(place)
    found: dict[int, Any] = {}
    for wanted, places in groups.items():
        answers = _attribute(model, [asked[place] for place in places], wanted, each)
        found.update(zip(places, answers, strict=True))
    if found and all(map(_not_of_a_prompt, found.values())):
        raise next(iter(found.values()))
    return [_checked(found.get(place, error)) for place, error in enumerate(asked)]


def _attribute(model, questions, methods, each):
    """The answers to ``questions``, or what went wrong there.

    Where a batch fails it is halved, until what fails stands alone.
    """
    try:
        return list(attribute_all(model, questions, methods, each=each, budget=BUDGET))
    except torch.AcceleratorError:  # of a device that is lost
        raise
    except Exception as error:
        if len(questions) == 1:
            return [error.with_traceback(None)]  # which holds tensors
    half = len(questions) // 2
    halves = (questions[:half], questions[half:])
    return [answer for some in halves for answer in _attribute(model, some, methods, each)]


def _not_of_a_prompt(answer):
    """True for an error that is no prompt's fault, if every prompt meets one."""
    overflow = isinstance(answer, InputError) and answer.field == "scores"
    return isinstance(answer, Exception) and not overflow


def _checked(answer):
    """An answer, or the error that there is nothing to compare, or to explain."""
    if not isinstance(answer, Exception) and answer[0].target is None:
        fault = "The foil is the model's own next token"
        if answer[0].foil is None:
            fault = "The model's own next token is a row of its table that stands for no token"
        return InputError(f"{fault}: name the target, too.")
    return answer


# --- the tables --------------------------------------------------------------------------------


def _tables(tokenizer, jobs, answers, methods, origin, hidden):
    """``(folder, table)`` in the order they are written, ``prompts`` last.

    Nothing ``hidden`` stands in an error.
    """
    scores, evidence, prompts = defaultdict(lambda: defaultdict(list)), defaultdict(list), []
    for job, answer in zip(jobs, answers, strict=True):
        prompts.append(origin | _prompt_row(tokenizer, job, answer, _methods(job, methods)))
        if isinstance(answer, Exception):
            prompts[-1]["error"] = hidden.without(_told(answer))[:2000]
            continue
        _, results = answer
        losses = results["occlusion"].scores if "occlusion" in results else None
        for method, result in results.items():
            _extend_scores(scores[method], job, result)
            evidence[method].append(_evidence_row(job, result, losses))
    for method, columns in scores.items():
        yield f"scores/method={method}", pa.table(columns, SCORES)
        yield f"evidence/method={method}", pa.Table.from_pylist(evidence[method], EVIDENCE)
    columns = carried_columns(dict.fromkeys(name for job in jobs for name in job.meta))
    fields = [*PROMPTS, *(pa.field(column, pa.string()) for column in columns.values())]
    for row, job in zip(prompts, jobs, strict=True):
        row |= {columns[name]: _as_text(value) for name, value in job.meta.items()}
    yield "prompts", pa.Table.from_pylist(prompts, pa.schema(fields, PROMPTS.metadata))


def _extend_scores(columns, job, result):
    """The rows of the total and, where there are several outputs, those of each."""
    outputs = result.each if len(result.outputs) > 1 else []
    for output, scores in [(None, result.scores), *enumerate(outputs)]:
        count = len(result.units)
        errors = result.errors if output is None else None
        columns["id"] += [job.identity] * count
        columns["output"] += [output] * count
        columns["unit"] += range(count)
        columns["part"] += [unit.part for unit in result.units]
        columns["label"] += [unit.label for unit in result.units]
        columns["start"] += [unit.positions[0] for unit in result.units]
        columns["end"] += [unit.positions[-1] + 1 for unit in result.units]
        columns["score"] += scores.tolist()
        columns["error"] += [None] * count if errors is None else errors.tolist()


def _evidence_row(job, result, losses):
    """``losses`` [units] is what the objective loses by each unit, where occlusion was run.

    The strongest unit is looked for where somebody wrote: a template's token, or one of the
    answer's own, is nothing that a prompt could be changed in.
    """
    written = [i for i, unit in enumerate(result.units) if unit.part not in UNWRITTEN]
    scores = result.scores if result.signed else result.scores.abs()
    strongest = written[int(scores[written].argmax())]
    as_they_are = ("gap", "closed", "evaluations", "forwards", "seconds", "signed")
    return {name: getattr(result, name) for name in as_they_are} | {
        "id": job.identity,
        "outputs": list(result.outputs) if len(result.outputs) > 1 else None,
        "largest_error": None if result.errors is None else float(result.errors.max()),
        "strongest": strongest,
        "strongest_loss": None if losses is None else float(losses[strongest]),
        "mean_loss": None if losses is None else float(losses[written].mean()),
        "most_loss": None if losses is None else float(losses[written].max()),
    }


def _prompt_row(tokenizer, job, answer, methods):
    messages, given = job.parameters.get("messages"), job.parameters
    row = {
        "id": job.identity,
        "slug": _text(job.slug),
        "prompt": _text(job.prompt),
        "messages": _text(json.dumps(messages, ensure_ascii=False)) if messages else None,
        "chat": bool(messages or given.get("chat")),
        "units": "sources" if given.get("sources") else given.get("units") or "tokens",
        "target_given": bool(given.get("target") or given.get("answer_text")),
        "methods": list(methods),
    }
    if isinstance(answer, Exception):
        return row | {"tokens": job.tokens, "left_out": []}
    question, results = answer
    told = [note for result in results.values() for note in result.notes]  # the question's, too
    return row | {
        "tokens": len(question.labels),
        "target_ids": list(question.target),
        "target": question.target_label,
        "foil_ids": None if question.foil is None else list(question.foil),
        "foil": question.foil_label,
        "probability": question.probability,
        "top_id": question.top,
        "top": tokenizer.decode([question.top]),
        "top_probability": question.top_probability,
        "notes": list(dict.fromkeys([*question.notes, *told])),
        "left_out": [name for name in methods if name not in results],
    }


def _as_text(value):
    """What is carried, as text: other JSON than a text is written as JSON."""
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def _text(text):
    """Text as UTF-8 can hold it: half of a surrogate pair, which only an error has, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _told(error):
    message = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return _text(message)


def _write(path, table):
    """Write a table to ``path``, whole or not at all; the bytes it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_whole(path, content.getvalue())
    return content.tell()
