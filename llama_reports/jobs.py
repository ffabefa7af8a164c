"""From entries to jobs: every check that needs no model, before anything is run."""

import ast
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import nbformat
import papermill
from slugify import slugify

from helpers.attribution import METHODS
from helpers.attribution.engine import texts_and_outputs
from helpers.errors import InputError
from helpers.model_folders import public_name
from helpers.models import BUNDLED, load_tokenizer, resolve_model
from helpers.questions import ANSWER, read_question, with_likeliest
from helpers.summary import default_units
from llama_reports import DEFAULT_NOTEBOOK
from llama_reports.checked import CheckedFile, CheckedWriter, file_digest, kept_check
from llama_reports.files import read_mapping
from llama_reports.prompts import MOST_CARRIED, Complaints, Entry, Row, is_reserved, open_entries
from llama_reports.run import ASKED, Job, asked, literal
from llama_reports.versions import code_version, model_digest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
DIGITS = (0, 6, 16, 32)  # of a question's digest in a folder's name


class Plan:
    """The jobs that a prompts file asks for, in its order, all of them checked before any is run.

    Every entry is checked for its keys, against the tokenizer and context of ``model``, and
    against the parameters of its notebook; no weights are loaded. A report's folder is named by
    the entry's id, or by its prompt; where that name stands for another question, in this file or
    in ``out``, the beginning of the question's digest is added to it. ``folders=False`` names no
    folders: a job's slug is then its id, or empty. ``rows`` is what ``open_entries`` gave of the
    file, where that was called before.

    ``keep`` leaves what the check has found in ``out``, as ``plan.parquet``: the next plan of the
    same file, model, code and choices reads that. Iterating reads it again and makes one ``Job`` at
    a time, so what is held of a prompt is a few numbers, one array [jobs] of each: ``tokens`` are
    the lengths of what is read, ``units`` the scores of a method, ``outputs`` the tokens explained
    (at most, where the model is to answer; of the two longest options, where it is to choose),
    ``texts`` those that are read for them, and ``kinds`` says which of ``asked``, a list of
    ``(notebook, methods)``, each job is; no methods are the notebook's own choice. ``replaced``
    counts reports in ``out`` whose id now stands for another question. ``carried`` are the names of
    all that its entries carry, a tuple.

    Raises one ``InputError`` that names the place of each entry that cannot run, the first 20 of
    them in full; and one if the name of a job stands in ``out`` for a report of another model,
    unless ``replace`` says that it may be replaced.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: str | Path = BUNDLED,
        notebook: str | Path = DEFAULT_NOTEBOOK,
        methods: Sequence[str] = (),
        dtype: str = "float32",
        out: str | Path | None = None,
        folders: bool = True,
        replace: bool = False,
        rows: Iterator[Row] | None = None,
    ) -> None:
        folder = Path(model).expanduser()  # whole: kernels and workers run in other folders
        local = model != BUNDLED and folder.exists()
        self.model = str(folder.resolve()) if local else str(model)
        self.path, self.dtype, self.model_digest = Path(path), dtype, model_digest(self.model)
        self.methods = [name for name in methods if METHODS[name]]  # refuses what is no method
        self._notebook, self._folders = notebook_path(notebook), folders
        self._digest = cache(notebook_digest)
        self._takes = cache(parameter_names)
        self._given = {"model_name": self.model, "dtype": dtype, "output_dir": "."}
        self._by = [public_name(model), self.model_digest, code_version()]
        if "prompt" not in self._takes(self._notebook):
            raise InputError(
                f"The notebook {notebook} takes no prompt, so it cannot be a report: assign prompt "
                "in a cell with the tag parameters."
            )
        known = self._found_by()
        kept = kept_check(out, self.path, known)
        self._kept = CheckedFile(*self._check(rows, known)) if kept is None else kept
        self.asked, self.carried = self._kept.asked, tuple(self._kept.carried)
        self.tokens, self.units, self.outputs, self.texts, self.kinds = self._kept.sizes
        taken = _Folders(out if folders else None, *self._by[:2])
        self._levels = self._named(taken)
        self.replaced = taken.replaced
        if taken.others and not replace:
            raise InputError(
                f"{out} has reports of another model under {len(taken.others):,} of these names "
                f"({taken.others[0]}): choose another --out, or give --replace."
            )
        self._keeps = None if out is None or kept else Path(out)

    def keep(self) -> None:
        """Keep the check in ``out``, a folder that is made where there is none."""
        if self._keeps is not None:
            self._kept.keep(self._keeps)

    def _found_by(self):
        """The digest of the file, and that of all else that what the check finds depends on."""
        code = [*self._by, code_version(Path(__file__).parent), sorted(METHODS)]
        notebooks = sorted({self._notebook, *NOTEBOOKS.glob("*.ipynb")})
        choices = [self.methods, self._folders, str(self._notebook)]
        return file_digest(self.path), _digest_of([code, choices, *map(file_digest, notebooks)])

    def _check(self, rows, known):
        """Check all rows; gives what ``CheckedFile`` takes."""
        tokenizer = load_tokenizer(self.model)
        context, vocabulary = _limits(self.model)
        seen: dict[int, int] = {}  # shortened question: line
        kinds: dict[tuple, int] = {}  # notebook and methods: number
        carried: dict[str, None] = {}  # a set in the order of the file
        bad, count, writer = Complaints(self.path), 0, CheckedWriter()
        for row in open_entries(self.path) if rows is None else rows:
            count += 1
            try:
                if row.problem is not None:
                    raise row.problem
                entry = row.entry
                source, parameters, question = self._ask(entry)
                read = read_question(
                    tokenizer, **asked(parameters), context=context, vocabulary=vocabulary
                )
                named = {"units", "sources"} & set(parameters)
                if self._folders and source.stem == DEFAULT_NOTEBOOK and not named:
                    read = default_units(read)
                if entry.evidence is not None and not read.places(entry.evidence):
                    raise InputError(
                        f"The evidence {entry.evidence!r} is not a whole word of the prompt: write "
                        "it as it stands there.",
                        field="evidence",
                    )
                _carry(carried, entry)
                short = _short(question)
                if short in seen:
                    raise InputError(f"It asks the same as {row.unit} {seen[short]}: remove one.")
            except InputError as error:
                bad.add(row, error)
                continue
            seen[short] = row.at
            more = max(1, parameters.get("answer", 1)) - 1  # tokens that the model is yet to write
            kind = kinds.setdefault((source, frozenset(parameters.get("methods", ()))), len(kinds))
            texts, outputs = map(len, texts_and_outputs(_of_the_longest(read)))
            sizes = read.input_ids.shape[1], len(read.units) + more, outputs + more, texts, kind
            writer.add(row, entry, sizes)
        bad.refuse(count)
        if file_digest(self.path) != known[0]:
            raise InputError(f"{self.path} has changed while it was checked: start again.")
        kinds_of = [(source.stem, sorted(methods)) for source, methods in kinds]
        return writer.finished(known, kinds_of, list(carried)), self.path.name

    def _named(self, taken):
        """The level of each job's name, an array; see ``_name``."""
        levels, bad = array("B"), Complaints(self.path)
        if not self._folders:
            return array("B", bytes(len(self)))
        for row, entry, _ in self._kept:
            try:
                levels.append(taken.level(entry, self._ask(entry)[2], row))
            except InputError as error:
                bad.add(row, error)
        bad.refuse(len(self))
        return levels

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Job]:
        for read, (_, entry, carried) in enumerate(self._kept):
            level = self._levels[read]
            source, parameters, question = self._ask(entry)
            yield Job(
                slug=_name(entry, question, level) if self._folders else entry.id or "",
                prompt=entry.text,
                notebook=source,
                parameters=parameters,
                identity=_digest_of([question, self.dtype, self._digest(source), *self._by]),
                question=question,
                tokens=int(self.tokens[read]),
                units=int(self.units[read]),
                outputs=int(self.outputs[read]),
                texts=int(self.texts[read]),
                model_digest=self.model_digest,
                meta={name: carried.get(name) for name in self.carried},
            )

    def _ask(self, entry: Entry) -> tuple[Path, dict, str]:
        """``(notebook, parameters, digest of the question)`` of an entry, or ``InputError``."""
        source = self._notebook if entry.notebook is None else find_notebook(entry.notebook)
        takes = self._takes(source)
        # all that is asked: the model, its dtype and where it is saved are no part of it
        parameters = _parameters(entry, source, takes, self.methods)
        question = _digest_of([source.stem, parameters])
        known = {name: value for name, value in self._given.items() if name in takes}
        return source, parameters | known, question


plan = Plan  # as what makes one is called


def find_notebook(name: str) -> Path:
    """The path of a notebook of this collection; all that a prompts file may name.

    A prompts file is data, and must not choose by a path what code is run.
    """
    known = sorted(file.stem for file in NOTEBOOKS.glob("*.ipynb"))
    if name not in known:
        shown = str(name)[:80]
        raise InputError(
            f"There is no notebook {shown!r}: choose from {', '.join(known)}.", field="notebook"
        )
    return NOTEBOOKS / f"{name}.ipynb"


def notebook_path(given: str | Path) -> Path:
    """The path of a notebook of this collection by name, or of any notebook by path to it."""
    path = Path(given)
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    return find_notebook(str(given))


def notebook_digest(path: str | Path) -> str:
    """SHA-256 of what a notebook does, in hexadecimal: its cells' sources, types and tags.

    Outputs and counts do not matter. Raises ``InputError`` for a file that is no notebook.
    """
    cells = _cells(path)
    return _digest_of([[c.cell_type, c.source, c.metadata.get("tags", [])] for c in cells])


def parameter_names(path: str | Path) -> set[str]:
    """What a notebook's cell with the tag ``parameters`` assigns: the names that it takes.

    The cell is read as Python, with magics or without; one that is not, as papermill guesses it.
    Raises ``InputError`` for a file that is no notebook.
    """
    tagged = [cell for cell in _cells(path) if "parameters" in cell.metadata.get("tags", [])]
    try:
        tree = _tree(tagged[0].source if tagged else "")
    except (SyntaxError, ValueError):
        try:
            return set(papermill.inspect_notebook(literal(path)))
        except ValueError:  # it says no kernel or language
            return set()
    targets = [
        target
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    found = [name for target in targets for name in ast.walk(target)]
    return {n.id for n in found if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _tree(source):
    try:
        return ast.parse(source)
    except SyntaxError:  # a line such as %matplotlib inline
        from IPython.core.inputtransformer2 import TransformerManager  # takes a second to import

        return ast.parse(TransformerManager().transform_cell(source))


def _cells(path):
    try:
        return nbformat.read(path, as_version=4).cells
    except (OSError, ValueError, AttributeError, nbformat.ValidationError) as error:
        raise InputError(f"{path} is not a notebook that Jupyter can read.") from error


# --- one entry ---------------------------------------------------------------------------------


def _parameters(entry, notebook, takes, methods):
    """What of an entry papermill passes to ``notebook``, which ``takes`` these parameters."""
    answer = ANSWER if entry.answer is True else entry.answer
    wanted = {name: getattr(entry, name) for name in ("prompt", "messages", *ASKED, "evidence")}
    wanted |= {"answer_text" if isinstance(answer, str) else "answer": answer}
    wanted |= {"methods": entry.methods or methods}
    given = {n: v for n, v in wanted.items() if v is not None and v is not False and v != []}
    for name in given:
        if name not in takes:
            wrong = f"The notebook {notebook.stem} has no parameter {name!r}: drop it."
            raise InputError(wrong, field=name.removesuffix("_text"))
    return given


def _carry(carried, entry):
    """Add the names that an entry carries to those of the file."""
    carried |= dict.fromkeys(entry.carried)
    names = list(carried)
    if len(names) > MOST_CARRIED:
        raise InputError(
            f"{names[MOST_CARRIED][:80]!r} is one name too many: a file carries at most "
            f"{MOST_CARRIED} beside the keys, so drop some."
        )


def _limits(model):
    """The most tokens that ``model`` reads, and how many it knows; ``None`` where it is silent."""
    config = json.loads((resolve_model(model) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    return config.get("max_position_embeddings"), config.get("vocab_size")


def _of_the_longest(question):
    """``question`` about its longest options, while the model is yet to choose between these."""
    if not question.undecided:
        return question
    return with_likeliest(question, [len(option.ids) for option in question.options])


# --- digests and names -------------------------------------------------------------------------


def _digest_of(values):
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _short(digest):
    """64 bits of a digest: enough to tell the entries of a file apart."""
    return int(digest[:16], 16)


def _name(entry, question, level):
    """A folder's name, which reads like the prompt; at a higher ``level`` with more of a digest."""
    if entry.id is not None:
        return entry.id
    words = slugify(entry.title[:300], max_length=60, word_boundary=True)
    return f"{words or 'prompt'}-{question[: DIGITS[level]]}" if level else words


class _Folders:
    """Which folder names are taken: by entries of a file, and by what ``out`` holds.

    Names that differ in case only are one folder on some systems, and so they are here.
    """

    def __init__(self, out, model, digest):
        self.out = out and Path(out)
        self.model = {"model": model, "model_digest": digest}
        there = self.out.iterdir() if out and self.out.exists() else []
        self.there = {folder.name.lower(): folder for folder in there}
        self.taken = {}  # shortened digest of a name: line
        self.replaced = 0
        self.others = []  # names that are there for a report of another model

    def level(self, entry, question, row):
        """At which level of ``_name`` an entry gets a folder of its own; it is taken from then."""
        for level in range(len(DIGITS)):
            name = _name(entry, question, level).lower()
            short, there = _short(_digest_of(name)), self.there.get(name)
            facts = read_mapping(there / "report.json") if there else {"question": question}
            is_own = facts.get("question") == question
            if entry.id is None:
                if not name or is_reserved(name) or short in self.taken or not is_own:
                    continue
            elif short in self.taken or not facts:
                held = f"names something in {self.out} that is no report"
                if short in self.taken:
                    held = f"is that of {row.unit} {self.taken[short]}"
                raise InputError(f"Its id {entry.id!r} {held}: choose another.", field="id")
            else:
                self.replaced += not is_own
            if any(facts.get(fact, known) != known for fact, known in self.model.items()):
                self.others.append(there.name)
            self.taken[short] = row.at
            return level
        raise InputError("Its folder's name is taken at every length: give it an id.")
