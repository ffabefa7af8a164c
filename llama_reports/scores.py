"""Scores without notebooks: prompts attributed in batches, written as partitioned Parquet.

A part is a few hundred prompts. Its files are named by the ids in it, each is whole or absent, and
the last one written is that in ``prompts``: a part without it was not finished, and doing it again
writes the same names. docs/scores.md describes the tables, column by column.
"""

import hashlib
import io
import time
from functools import lru_cache
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from helpers.attribution import METHODS
from helpers.attribution.batches import ask_many, attribute_many, completed
from helpers.errors import InputError
from helpers.models import BUNDLED, load_model, public_name, weights_digest
from helpers.provenance import code_version
from helpers.questions import Question
from llama_reports.files import write_whole

DEFAULT_METHODS = ("relevance", "saliency", "gradient_x_input", "random")
PART = 512  # prompts: some ten thousand scores a method and file, and little lost by a kill
WINDOW = 8 * PART  # prompts sorted by length together, so that a part holds few lengths
SCHEMA_VERSION = "1"
VERSION_KEY = b"llama_notebooks.scores_version"


def _schema(**columns):
    """Columns of one table; those named with a type in a list may be null."""
    fields = [
        pa.field(name, kind[0] if isinstance(kind, list) else kind, isinstance(kind, list))
        for name, kind in columns.items()
    ]
    return pa.schema(fields, metadata={VERSION_KEY: SCHEMA_VERSION})


SCORES = _schema(
    id=pa.string(),
    position=pa.int32(),
    token=pa.string(),
    token_id=pa.int32(),
    score=pa.float32(),
    error=[pa.float32()],
)
EVIDENCE = _schema(
    id=pa.string(),
    target_id=pa.int32(),
    foil_id=[pa.int32()],
    gap=[pa.float64()],
    closed=[pa.bool_()],
    largest_error=[pa.float32()],
    evaluations=pa.int32(),
    forwards=pa.int32(),
    seconds=pa.float64(),
    signed=pa.bool_(),
    strongest=pa.int32(),
    strongest_loss=[pa.float32()],
    mean_loss=[pa.float32()],
    most_loss=[pa.float32()],
)
PROMPTS = _schema(
    id=pa.string(),
    slug=pa.string(),
    prompt=pa.string(),
    chat=pa.bool_(),
    tokens=pa.int32(),
    target_id=[pa.int32()],
    target=[pa.string()],
    target_given=pa.bool_(),
    foil_id=[pa.int32()],
    foil=[pa.string()],
    top_id=[pa.int32()],
    top=[pa.string()],
    top_probability=[pa.float32()],
    target_probability=[pa.float32()],
    methods=pa.list_(pa.string()),
    error=[pa.string()],
    model=pa.string(),
    weights_sha256=pa.string(),
    code_version=pa.string(),
    dtype=pa.string(),
    device=pa.string(),
    attention_implementation=pa.string(),
    torch=pa.string(),
    transformers=pa.string(),
)


# --- what is to be done ------------------------------------------------------------------------


def chunks(jobs, size=PART, window=WINDOW, done=frozenset()):
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


def finished_ids(out):
    """The ids of all prompts that are done in ``out``, those with an error among them: a set.

    Raises ``InputError`` if a table there was written by another version of this one.
    """
    found = set()
    for file in sorted(Path(out).glob("prompts/part-*.parquet")):
        try:
            table = pq.read_table(file, columns=["id"], partitioning=None)
        except (pa.ArrowException, KeyError) as error:
            raise InputError(f"{file} is not one of our tables: move it away.") from error
        written = (table.schema.metadata or {}).get(VERSION_KEY, b"none").decode()
        if written != SCHEMA_VERSION:
            raise InputError(
                f"{file} has scores of version {written}, and this code writes version "
                f"{SCHEMA_VERSION}: choose another folder."
            )
        found.update(table["id"].to_pylist())
    return found


def discard_unfinished(out):
    """Remove what a killed run left in ``out``: files of parts that have no row in ``prompts``.

    Nothing that is finished is touched. Call it before a run, never during one: a part that is
    being written is not finished either.
    """
    out = Path(out)
    whole = {file.name for file in out.glob("prompts/part-*.parquet")}
    for file in [*out.glob("scores/method=*/*"), *out.glob("evidence/method=*/*")]:
        if file.name.startswith((".part-", "part-")) and file.name not in whole:
            file.unlink(missing_ok=True)
    for file in out.glob("prompts/.part-*"):
        file.unlink(missing_ok=True)


# --- doing it ----------------------------------------------------------------------------------


def score_part(jobs, out, *, model=BUNDLED, dtype="float32", methods=DEFAULT_METHODS, threads=1):
    """Attribute ``jobs`` together and write their part of the tables in ``out``; returns facts.

    A job's own methods, where it names some, go before ``methods``. A prompt that cannot be run
    gets its row in ``prompts`` with the error, and the others are not held up. The model is loaded
    at the first call in a process and kept. ``threads`` is the number of torch's threads while
    inside.

    The facts are plain values: ``part``, ``prompts``, ``failed``, ``tokens`` (those attributed),
    ``bytes`` on disk, and ``seconds`` by what they were spent on.

    Raises ``InputError`` for a model that cannot be loaded or does not support a method, and the
    error that was met if not one prompt could be run; then nothing was written.
    """
    found = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _score_part(jobs, Path(out), model, dtype, tuple(methods))
    finally:
        torch.set_num_threads(found)


def _score_part(jobs, out, model_name, dtype, methods):
    clock = [time.perf_counter()]
    jobs = list({job.identity: job for job in jobs}.values())
    model, tokenizer, origin = _loaded(model_name, dtype)
    clock.append(time.perf_counter())
    asked = [_ask(model, tokenizer, job) for job in jobs]
    clock.append(time.perf_counter())
    answers = _answers(model, tokenizer, jobs, asked, methods)
    clock.append(time.perf_counter())
    tables = _tables(tokenizer, jobs, asked, answers, methods, origin)
    name = f"part-{_digest(jobs)}.parquet"
    written = sum(_write(out / folder / name, table) for folder, table in tables)
    clock.append(time.perf_counter())
    spent = [after - before for before, after in pairwise(clock)]
    done = [question for question in asked if isinstance(question, Question)]
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
    origin = {
        "model": public_name(name),
        "weights_sha256": weights_digest(name),
        "code_version": code_version(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention_implementation": model.config._attn_implementation,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return model, tokenizer, origin


def _digest(jobs):
    ids = "\n".join(sorted(job.identity for job in jobs))
    return hashlib.sha256(ids.encode()).hexdigest()[:16]


def _ask(model, tokenizer, job):
    """The question of a job, its target open where none is named, or the error it met."""
    wanted = {name: job.parameters.get(name) for name in ("target", "foil")}
    entry = {"prompt": job.prompt, "chat": bool(job.parameters.get("chat")), **wanted}
    try:
        return ask_many(model, tokenizer, [entry], open_targets=True)[0]
    except (TypeError, ValueError) as error:  # text that the tokenizer itself chokes on
        return error


def _methods(job, methods):
    return tuple(dict.fromkeys(job.parameters.get("methods") or methods))


def _answers(model, tokenizer, jobs, asked, methods):
    """``Answered`` by place; questions in ``asked`` are completed, or give way to their error."""
    groups = {}
    for place, (job, question) in enumerate(zip(jobs, asked, strict=True)):
        if isinstance(question, Question):
            groups.setdefault(_methods(job, methods), []).append(place)
    answers, errors = {}, {}
    for wanted, places in groups.items():
        _attribute_all(model, asked, places, wanted, answers, errors)
    if errors and not answers:
        raise next(iter(errors.values()))  # the fault is not a prompt's
    for place, error in errors.items():
        asked[place] = error
    for place, answer in answers.items():
        if asked[place].target is None:
            asked[place] = completed(tokenizer, asked[place], answer)
    return answers


def _attribute_all(model, asked, places, methods, answers, errors):
    """Put the answers of ``places`` into ``answers``, and what goes wrong into ``errors``.

    Where a batch fails it is halved, until what fails stands alone.
    """
    try:
        found = attribute_many(model, [asked[place] for place in places], methods)
        answers.update(zip(places, found, strict=True))
    except (InputError, torch.AcceleratorError):  # of the model, or of a device that is lost
        raise
    except Exception as error:
        if len(places) == 1:
            errors[places[0]] = error.with_traceback(None)  # which holds tensors
            return
        half = len(places) // 2
        for some in (places[:half], places[half:]):
            _attribute_all(model, asked, some, methods, answers, errors)


# --- the tables --------------------------------------------------------------------------------


def _tables(tokenizer, jobs, asked, answers, methods, origin):
    """``(folder, table)`` in the order they are written, ``prompts`` last."""
    scores, evidence, prompts = {}, {}, _columns(PROMPTS)
    for place, (job, question) in enumerate(zip(jobs, asked, strict=True)):
        answer = answers.get(place) if isinstance(question, Question) else None
        _append(prompts, _prompt_row(tokenizer, job, question, answer, methods) | origin)
        if answer is None:
            continue
        losses = answer.results["occlusion"].scores if "occlusion" in answer.results else None
        for method, result in answer.results.items():
            rows = scores.setdefault(method, _columns(SCORES))
            _extend_scores(rows, job, question, result)
            rows = evidence.setdefault(method, _columns(EVIDENCE))
            _append(rows, _evidence_row(job, question, result, losses))
    for method in METHODS:
        if method in scores:
            yield f"scores/method={method}", pa.table(scores[method], SCORES)
            yield f"evidence/method={method}", pa.table(evidence[method], EVIDENCE)
    yield "prompts", pa.table(prompts, PROMPTS)


def _columns(schema):
    return {name: [] for name in schema.names}


def _append(columns, row):
    for name, values in columns.items():
        values.append(row[name])


def _extend_scores(columns, job, question, result):
    seq = len(question.labels)
    columns["id"] += [job.identity] * seq
    columns["position"] += range(seq)
    columns["token"] += question.labels
    columns["token_id"] += question.input_ids[0].tolist()
    columns["score"] += result.scores.tolist()
    columns["error"] += [None] * seq if result.errors is None else result.errors.tolist()


def _evidence_row(job, question, result, losses):
    """``losses`` [seq] is what the objective loses by each token, where occlusion was run."""
    strongest = int((result.scores if result.signed else result.scores.abs()).argmax())
    return {
        "id": job.identity,
        "target_id": question.target,
        "foil_id": question.foil,
        "gap": result.gap,
        "closed": result.closed,
        "largest_error": None if result.errors is None else float(result.errors.max()),
        "evaluations": result.evaluations,
        "forwards": result.forwards,
        "seconds": result.seconds,
        "signed": result.signed,
        "strongest": strongest,
        "strongest_loss": None if losses is None else float(losses[strongest]),
        "mean_loss": None if losses is None else float(losses.mean()),
        "most_loss": None if losses is None else float(losses.max()),
    }


def _prompt_row(tokenizer, job, question, answer, methods):
    failed = answer is None
    return {
        "id": job.identity,
        "slug": _text(job.slug),
        "prompt": _text(job.prompt),
        "chat": bool(job.parameters.get("chat")),
        "tokens": job.tokens if failed else len(question.labels),
        "target_id": None if failed else question.target,
        "target": None if failed else question.target_label,
        "target_given": job.parameters.get("target") is not None,
        "foil_id": None if failed else question.foil,
        "foil": None if failed else question.foil_label,
        "top_id": None if failed else answer.top,
        "top": None if failed else tokenizer.decode([answer.top]),
        "top_probability": None if failed else answer.top_probability,
        "target_probability": None if failed else answer.probability,
        "methods": list(_methods(job, methods)),
        "error": _told(question) if failed else None,
    }


def _text(text):
    """Text as UTF-8 can hold it: half of a surrogate pair, which only an error has, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _told(error):
    message = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return _text(message)[:2000]


def _write(path, table):
    """Write a table to ``path``, whole or not at all; the bytes it takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_whole(path, content.getvalue())
    return content.tell()
