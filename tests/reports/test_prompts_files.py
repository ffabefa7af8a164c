"""Prompts files: four formats that say the same, errors that name their place, names of folders."""

import csv
import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

import helpers
import llama_reports
from helpers import InputError
from helpers.attribution import METHODS
from helpers.models import tiny_llama
from helpers.provenance import code_version, model_digest
from llama_reports import jobs as jobs_module
from llama_reports.jobs import find_notebook, finished, notebook_digest, plan
from llama_reports.prompts import LONGEST_LINE, Entry, read_entries

SCHEMA = pyarrow.schema(
    [
        (name, pyarrow.string())
        for name in ("prompt", "id", "target", "foil", "evidence", "notebook")
    ]
    + [("chat", pyarrow.bool_()), ("methods", pyarrow.list_(pyarrow.string()))]
)


def as_csv(entries):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Entry.model_fields))
    writer.writeheader()
    for entry in entries:
        cells = {name: value for name, value in entry.items() if name != "methods"}
        writer.writerow(cells | {"methods": " ".join(entry.get("methods", []))})
    return text.getvalue().encode()


def as_parquet(entries):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries, SCHEMA), sink)
    return sink.getvalue()


FORMATS = {
    "yml": lambda entries: yaml.safe_dump(entries, allow_unicode=True).encode(),
    "csv": as_csv,
    "jsonl": lambda entries: "\n".join(map(json.dumps, entries)).encode(),
    "parquet": as_parquet,
}


@pytest.fixture
def planned(tmp_path, tiny_folder):
    """A function: the plan of a file of this name and content, for the toy model."""

    def planned(name, content, **options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return plan(path, model=str(tiny_folder), **options)

    return planned


@pytest.fixture
def refused(planned):
    """A function: the message with which the plan of such a file is refused."""

    def refused(name, content, **options):
        with pytest.raises(InputError) as caught:
            planned(name, content, **options)
        return str(caught.value)

    return refused


# --- the same in every format ------------------------------------------------------------------

text = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12)
letter = st.sampled_from("abcdefgh")
entries = st.lists(
    st.fixed_dictionaries(
        {"prompt": text.filter(str.strip)},
        optional={
            "id": st.from_regex(r"[a-z][a-z0-9_.]{0,8}[a-z]", fullmatch=True),
            "target": letter,
            "foil": letter.map(str.upper),
            "chat": st.booleans(),
            "methods": st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=3),
            "notebook": st.sampled_from(["08_comparison"]),
        },
    ),
    min_size=1,
    max_size=4,
)


@given(entries=entries)
@example(
    entries=[{"prompt": 'a "quoted", b\nand\tmore', "target": " "}, {"prompt": "- #'{x}: &*!"}]
)
@settings(max_examples=30, deadline=None)
def test_the_same_entries_in_four_formats_are_the_same_jobs(entries, tiny_folder, tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("formats"), []
    for suffix, write in FORMATS.items():
        (folder / f"prompts.{suffix}").write_bytes(write(entries))
        try:
            jobs = list(plan(folder / f"prompts.{suffix}", model=str(tiny_folder)))
        except InputError as error:  # asked twice, or two of an id: the same entries in all
            jobs = str(error).splitlines()[0].split(":")[1]
        found.append(jobs)
    assert found[0] == found[1] == found[2] == found[3]
    if isinstance(found[0], list):
        assert [job.prompt for job in found[0]] == [entry["prompt"] for entry in entries]
        assert pickle.loads(pickle.dumps(found[0])) == found[0]


def test_a_string_a_line_and_yaml_anchors_are_read(planned):
    assert [job.prompt for job in planned("p.ndjson", '"Hi"\n\n{"prompt": "Ho"}\n')] == ["Hi", "Ho"]
    jobs = list(planned("p.yaml", "- &a {prompt: Hi, target: a}\n- {<<: *a, target: b}\n- Ho"))
    assert [job.parameters.get("target") for job in jobs] == ["a", "b", None]


def test_a_byte_order_mark_and_windows_lines_are_read(planned):
    for name, content in (
        ("p.csv", "prompt\r\nHé\r\n"),
        ("p.jsonl", '"Hé"\r\n'),
        ("p.yml", "- Hé"),
    ):
        (job,) = planned(name, b"\xef\xbb\xbf" + content.encode())
        assert job.prompt == "Hé"


@pytest.mark.parametrize("cell", ["true", "TRUE", "Yes", "1"])
def test_csv_cells_say_yes_and_name_methods(planned, cell):
    (job,) = planned("p.csv", f'prompt,chat,methods,foil\nHi,{cell},"saliency, random",\n')
    assert job.parameters["chat"] is True and job.parameters["methods"] == ["saliency", "random"]
    assert "foil" not in job.parameters  # an empty cell is not given


# --- errors that name file, row and column -----------------------------------------------------


@pytest.mark.parametrize(
    "name, content, place, complaint",
    [
        (
            "p.csv",
            'prompt,target\n"a\nb",c\nx,ab\n',
            "p.csv, line 4, row 2, column 'target':",
            "is 2",
        ),
        ("p.csv", "prompt,chat\nHi,perhaps\n", "line 2, row 1, column 'chat':", "valid boolean"),
        ("p.csv", "prompt,foil\n\nHi\n", "p.csv, line 3, row 1:", "1 cells and the header 2"),
        ("p.csv", "prompt,foil\nHi,a,b\n", "p.csv, line 2, row 1:", "3 cells and the header 2"),
        ("p.csv", 'prompt\n"a"b\nHi\n', "p.csv, line 2, row 1:", "not CSV"),
        ("p.csv", 'prompt\nHi\n"never\nclosed\n', "p.csv, line 3, row 2:", "not CSV"),
        ("p.csv", "prompt,target\n,a\n", "line 2, row 1, column 'prompt':", "prompt is empty"),
        ("p.csv", b"prompt\nHi\nM\xfcnchen\n", "p.csv, line 3, row 2:", "not UTF-8 (byte 0xfc)"),
        ("p.csv", b"prompt\na\0b\n", "p.csv, line 2, row 1:", "NUL byte"),
        ("p.csv", f"prompt\n{'x' * 140_000}\n", "p.csv, line 2, row 1:", "field limit"),
        ("p.jsonl", '"Hi"\n{"prompt": "x", "foil": "ab"}', "p.jsonl, line 2, key 'foil':", "is 2"),
        ("p.jsonl", '"Hi"\n\n{"prompt": \n"Ho"', "p.jsonl, line 3:", "not JSON"),
        ("p.jsonl", "[1]", "p.jsonl, line 1:", "JSON reads this as list"),
        ("p.jsonl", f"{'[' * 100_000}", "p.jsonl, line 1:", "an entry is"),
        ("p.jsonl", "1" * 5000, "p.jsonl, line 1:", "an entry is"),
        (
            "p.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            "p.jsonl, line 1:",
            "'prompt' is there twice",
        ),
        ("p.jsonl", b'"Hi"\n"\xff"\n', "p.jsonl, line 2:", "not UTF-8"),
        ("p.jsonl", r'"a\ud800"', "p.jsonl, line 1, key 'prompt':", "half of a surrogate"),
        ("p.jsonl", r'"a\u0000"', "p.jsonl, line 1, key 'prompt':", "a NUL character"),
        ("p.jsonl", r'{"prompt": "a", "foil": "\udc80"}', "line 1, key 'foil':", "valid string"),
        ("p.jsonl", '{"prompt": "a", "foil": "%s"}' % ("b" * 2000), "key 'foil':", "at most 1000"),
        (
            "p.yml",
            "- Hi\n- {prompt: x, target: ab}",
            "p.yml, line 2, entry 2 ('x'), key 'target':",
            "is",
        ),
        ("p.yml", "- Hi\n- {prompt: x, prompt: y}", "p.yml, line 2, entry 2:", "is there twice"),
        ("p.yml", "- Hi\n- 2024-05-45\n", "p.yml, line 2, entry 2:", "put the text in quotes"),
        ("p.yml", f"- Hi\n- {'9' * 5000}\n", "p.yml, line 2, entry 2:", "put the text in quotes"),
        ("p.yml", "- Hi\n- ? [a]\n  : b\n", "p.yml, line 2, entry 2:", "not YAML"),
        (
            "p.parquet",
            [{"prompt": "a"}, {"prompt": "b", "foil": "ab"}],
            "row 2, column 'foil':",
            "is 2",
        ),
        (
            "p.parquet",
            [{"prompt": "a"}, {"foil": "b"}],
            "p.parquet, row 2, column 'prompt':",
            "missing",
        ),
        (
            "p.parquet",
            [{"prompt": "a", "methods": ["no"]}],
            "row 1, column 'methods':",
            "no method 'no'",
        ),
    ],
)
def test_an_error_names_its_file_its_row_and_its_column(refused, name, content, place, complaint):
    content = as_parquet(content) if isinstance(content, list) else content
    message = refused(name, content)
    assert "none was started" in message
    assert place in message and complaint in message.split(place)[1]


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("p.csv", "text,target\nHi,a\n", "line 1: the column 'text' is unknown"),
        ("p.csv", "prompt;target\nHi;a\n", "separated by commas"),
        ("p.csv", "target,foil\na,b\n", "line 1: the column 'prompt' is missing"),
        ("p.csv", "prompt,prompt\na,b\n", "a column is there twice"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.csv", "", "holds no prompt"),
        ("p.csv", "prompt\nHi\n".encode("utf-16"), "line 1: There is a NUL byte"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.yml", b"- Hi\n- M\xfcnchen", "p.yml, line 2: this is not UTF-8"),
        ("p.yml", "- Hi\n- a\0b", "p.yml, line 2: the character '\\x00' cannot be in YAML"),
        ("p.yml", "- Hi\n---\n- Ho", "line 2: a second document"),
        ("p.yml", f"- {'[' * 3000}", "p.yml is nested too deeply"),
        ("p.parquet", b"", "is not whole Parquet"),
        ("p.parquet", as_parquet([{"prompt": "a"}])[:-30], "is not whole Parquet"),
        ("p.parquet", as_parquet([]), "holds no prompt"),
        ("p.json", "[]", "YAML (.yml, .yaml), CSV (.csv), JSON Lines (.jsonl, .ndjson) or Parquet"),
        ("p.csv.gz", "", "is compressed: unpack it first"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(refused, name, content, complaint):
    message = refused(name, content)
    assert complaint in message and len(message) < 300


def test_parquet_with_other_columns_or_damage_inside_is_refused(refused, tmp_path):
    table = pyarrow.table({"prompt": ["a"], "text": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "other.parquet")
    assert "column 'text' is unknown" in refused(
        "p.parquet", (tmp_path / "other.parquet").read_bytes()
    )
    whole = bytearray(as_parquet([{"prompt": f"prompt {i}"} for i in range(2000)]))
    whole[100:4000] = bytes(3900)
    assert "p.parquet" in refused("p.parquet", bytes(whole))


def test_folders_and_pipes_are_not_prompts_files(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_entries(tmp_path)
    with pytest.raises(InputError, match="must be a file"):
        read_entries("/dev/null")


def test_many_bad_rows_are_counted_and_the_first_told(refused):
    message = refused("p.jsonl", '"good"\n' + "{\n" * 30)
    assert "30 of 31 entries" in message and "line 21:" in message and "line 22:" not in message
    assert "… and 10 more." in message
    message = refused("p.parquet", as_parquet([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]))
    assert "row 3: It asks the same as row 1" in message


def test_a_line_without_end_is_not_held_and_the_next_is_read(refused):
    message = refused("p.jsonl", '"' + "x" * (LONGEST_LINE + 5) + '"\n{\n"Ho"')
    assert "2 of 3 entries" in message and "line 1: The line is longer" in message
    assert "line 2: This is not JSON" in message


def chain(first, line):
    """``first``, and nine lines that each repeat the one before nine times."""
    names = "abcdefghij"
    lines = [line % (b, ", ".join([f"*{a}"] * 9)) for a, b in itertools.pairwise(names)]
    return "\n".join([first, *lines, ""])


BOMBS = {
    "aliases": chain("- &a {id: [x]}", "- &%s {id: [%s]}") + "- {prompt: [*j, *j]}\n",
    "merges": chain("- &a {k: v}", "- &%s {<<: [%s]}"),
    "loop": "- &a [*a, *a]\n",
    "wide": f"- [{'x, ' * 200_000}]\n",
}
READ = """
import resource
import sys
from pathlib import Path
from llama_reports.prompts import InputError, parse_entry, read_entries

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, -1))
for path in sys.argv[1:]:
    try:
        for row in read_entries(path):
            try:
                print(row.place(), row.problem or parse_entry(row.raw).prompt)
            except InputError as error:
                print(row.place(error.field), error)
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process, as Linux can")
def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path):
    files = [tmp_path / f"{name}.yml" for name in BOMBS]
    for file in files:
        file.write_text("- fine\n" + BOMBS[file.stem], encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for file in files:
        assert any(file.name in line and "1,000 parts" in line for line in told), told
    assert len(done.stdout) < 10_000


# --- what is held ------------------------------------------------------------------------------


def test_a_plan_can_be_read_again_and_holds_a_few_numbers_a_prompt(planned):
    jobs = planned("p.jsonl", "\n".join(json.dumps(f"Prompt number {i}") for i in range(300)))
    assert list(jobs) == list(jobs) and len(jobs) == 300
    assert jobs.tokens.tolist() == [job.tokens for job in jobs]
    assert jobs.tokens[0] == len("Prompt number 0")  # a token a byte
    assert len(pickle.dumps([jobs._tokens, jobs._kinds, jobs._questions, jobs._levels])) < 300 * 24


@pytest.mark.parametrize("now", ['"Hi"\n"Other"\n', '"Hi"\n', '"Hi"\n"Ho"\n"More"\n', '"Hi"\n{'])
def test_a_file_that_changes_after_the_check_is_refused(planned, now):
    jobs = planned("p.jsonl", '"Hi"\n"Ho"\n')
    jobs.path.write_text(now, encoding="utf-8")
    with pytest.raises(InputError, match="has changed since it was checked"):
        list(jobs)


# --- a prompts file is data ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "made", ["{path}", "../notebooks/08_comparison", "08_comparison.ipynb", ""]
)
def test_an_entry_cannot_choose_code_by_path(refused, planned, tmp_path, made):
    path = tmp_path / "mine.ipynb"
    nbformat.write(nbformat.read(find_notebook("08_comparison"), 4), path)
    entry = json.dumps({"prompt": "Hi", "notebook": made.format(path=path)})
    assert "key 'notebook': There is no notebook" in refused("p.jsonl", entry)
    (job,) = planned("p.jsonl", '"Hi"', notebook=str(path))  # whoever runs the command may
    assert job.notebook == path.resolve()


USED = [
    "index.html",
    "comparison.html",
    "scores",
    "scores.parquet",
    "evidence",
    "prompts",
    "figures",
]
UNSAFE = [
    "Scores",
    ".hidden",
    "..",
    "a/b",
    "a\\b",
    "con",
    "NUL.txt",
    "ends.",
    "é",
    "a" * 81,
    "a\n",
    "",
]


@pytest.mark.parametrize("name", USED + UNSAFE)
def test_an_id_cannot_be_what_the_folder_uses_itself(refused, name):
    message = refused("p.jsonl", json.dumps({"prompt": "Hi", "id": name}))
    assert "key 'id':" in message and "cannot name a folder" in message


def test_an_id_cannot_take_what_is_no_report(refused, planned, tmp_path):
    (tmp_path / "out" / "Documents").mkdir(parents=True)
    entry = json.dumps({"prompt": "Hi", "id": "documents"})
    assert "is no report" in refused("p.jsonl", entry, out=tmp_path / "out")
    (job,) = planned("p.jsonl", '"Documents"', out=tmp_path / "out")
    assert job.slug.startswith("documents-")


# --- names of folders --------------------------------------------------------------------------


def write_report(out, job, **facts):
    folder = out / job.slug
    folder.mkdir(parents=True, exist_ok=True)
    known = {"slug": job.slug, "prompt": job.prompt, "question": job.question, "error": None}
    facts = known | {"identity": job.identity} | facts
    facts = {name: value for name, value in facts.items() if value != "absent"}
    (folder / "report.json").write_text(json.dumps(facts), encoding="utf-8")


def test_prompts_that_read_alike_get_folders_of_their_own(planned):
    first, second, third, *rest = planned("p.yml", "- Hello\n- Hello!\n- hello?\n- '!!'\n- Scores")
    assert first.slug == "hello"
    assert second.slug == f"hello-{second.question[:6]}"
    assert third.slug == f"hello-{third.question[:6]}"
    assert [job.slug for job in rest] == [
        f"prompt-{rest[0].question[:6]}",
        f"scores-{rest[1].question[:6]}",
    ]


def test_names_stay_apart_where_six_digits_do_not(planned, monkeypatch):
    monkeypatch.setattr(jobs_module, "DIGITS", (0, 1, 16, 32))
    same = "The same beginning of a prompt that is longer than sixty characters, and then "
    jobs = list(planned("p.jsonl", "\n".join(json.dumps(f"{same}{i}") for i in range(200))))
    assert len({job.slug for job in jobs}) == 200


def test_ids_that_differ_in_case_only_are_one_folder(refused):
    assert "is that of line 1" in refused("p.yml", "- {id: A, prompt: x}\n- {id: a, prompt: y}")


def test_a_second_file_adds_and_never_takes_the_folder_of_another_question(planned, tmp_path):
    out = tmp_path / "out"
    (first,) = planned("one.yml", "- Hello", out=out)
    write_report(out, first)
    other, again = planned("two.yml", "- Hello!\n- Hello", out=out)
    assert again.slug == "hello" and other.slug == f"hello-{other.question[:6]}"
    write_report(out, other)
    swapped = list(planned("three.yml", "- Hello\n- Hello!", out=out))
    assert swapped == [again, other]
    old = {"question": "absent"}  # a report from before: its prompt tells
    write_report(out, first, **old)
    assert next(iter(planned("four.yml", "- Hello\n- Hello?", out=out))).slug == "hello"
    write_report(out, first, prompt="Hallo", **old)
    assert next(iter(planned("five.yml", "- Hello", out=out))).slug == f"hello-{again.question[:6]}"


def test_an_id_keeps_its_folder_when_its_question_changes(planned, tmp_path):
    jobs = planned("p.yml", "- {id: a, prompt: x}", out=tmp_path / "out")
    assert jobs.replaced == 0
    write_report(tmp_path / "out", *jobs)
    assert planned("p.yml", "- {id: a, prompt: x}", out=tmp_path / "out").replaced == 0
    jobs = planned("p.yml", "- {id: a, prompt: y}", out=tmp_path / "out")
    assert jobs.replaced == 1 and [job.slug for job in jobs] == ["a"]
    assert not finished(*jobs, tmp_path / "out")


def test_without_folders_a_slug_is_the_id_alone(planned):
    jobs = planned("p.yml", "- Hello\n- Hello!\n- {id: a, prompt: x}", folders=False)
    assert [job.slug for job in jobs] == ["", "", "a"]


# --- the identity of a report ------------------------------------------------------------------


def test_identity_changes_with_all_that_a_report_depends_on(planned, tmp_path, monkeypatch):
    def one(entry='"Hi"', **options):
        (job,) = planned("p.jsonl", entry, **options)
        return job

    first = one()
    assert one() == first and one('{"prompt": "Hi", "id": "other"}').identity == first.identity
    asked = [
        '"Ho"',
        '{"prompt": "Hi", "target": "a"}',
        '{"prompt": "Hi", "foil": "a"}',
        '{"prompt": "Hi", "chat": true}',
        '{"prompt": "Hi", "evidence": "H"}',
        '{"prompt": "Hi", "methods": ["saliency"]}',
    ]
    others = [one(entry) for entry in asked]
    assert len({job.question for job in [first, *others]}) == 1 + len(asked)
    assert one(asked[-1]).question == one(methods=["saliency"]).question

    (tmp_path / "08_comparison.ipynb").write_text("", encoding="utf-8")
    cells = nbformat.read(find_notebook("08_comparison"), 4)
    cells.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(cells, tmp_path / "08_comparison.ipynb")
    answered = [one(notebook=str(tmp_path / "08_comparison.ipynb")), one(dtype="bfloat16")]
    monkeypatch.setattr(jobs_module, "code_version", lambda: "another")
    answered.append(one())
    monkeypatch.setattr(jobs_module, "model_digest", lambda name: "another")
    answered.append(one())
    assert {job.question for job in answered} == {first.question}
    assert len({job.identity for job in [first, *others, *answered]}) == 5 + len(asked)


def test_a_notebooks_digest_is_of_its_cells_and_not_of_its_outputs(tmp_path):
    nodes = nbformat.read(find_notebook("08_comparison"), 4)
    digest = notebook_digest(find_notebook("08_comparison"))
    for cell in nodes.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(nodes, tmp_path / "same.ipynb")
    assert notebook_digest(tmp_path / "same.ipynb") == digest
    nodes.cells[3].metadata["tags"] = ["parameters", "solution"]
    nbformat.write(nodes, tmp_path / "other.ipynb")
    assert notebook_digest(tmp_path / "other.ipynb") != digest
    (tmp_path / "no.ipynb").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="not a notebook"):
        notebook_digest(tmp_path / "no.ipynb")


def test_the_models_digest_is_of_weights_tokenizer_and_template(tmp_path):
    model, tokenizer = tiny_llama()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    seen = {model_digest(tmp_path)}
    (tmp_path / "README.md").write_text("words", encoding="utf-8")
    assert model_digest(tmp_path) in seen
    for name in ("chat_template.jinja", "tokenizer.json", "config.json"):
        file = tmp_path / name
        file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
        seen.add(model_digest(tmp_path))
    tiny_llama(seed=1)[0].save_pretrained(tmp_path)
    seen.add(model_digest(tmp_path))
    assert len(seen) == 5


def test_the_codes_version_changes_with_any_source(tmp_path, monkeypatch):
    from helpers import provenance

    (tmp_path / "inner" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(provenance, "SOURCES", tmp_path)
    seen = {code_version()}
    (tmp_path / "inner" / "a.py").write_text("1", encoding="utf-8")
    seen.add(code_version())
    (tmp_path / "inner" / "a.py").write_text("2", encoding="utf-8")
    seen.add(code_version())
    (tmp_path / "inner" / "__pycache__" / "a.pyc").write_text("3", encoding="utf-8")
    assert code_version() in seen and len(seen) == 3


def test_the_codes_version_is_that_of_helpers_whatever_becomes_of_a_page(tmp_path, monkeypatch):
    from helpers import provenance

    for package in (helpers, llama_reports):
        folder = Path(package.__file__).resolve().parent
        shutil.copytree(folder, tmp_path / package.__name__)
    assert Path(helpers.__file__).resolve().parent == provenance.SOURCES
    ours = code_version()
    monkeypatch.setattr(provenance, "SOURCES", tmp_path / "helpers")
    assert code_version() == ours
    with (tmp_path / "llama_reports" / "templates" / "style.css").open("a") as style:
        style.write("p { color: red }")
    assert code_version() == ours
    with (tmp_path / "helpers" / "data" / "ground_truth.yml").open("a") as table:
        table.write("# more")
    assert code_version() != ours


def test_finished_is_the_same_identity_and_no_error(planned, tmp_path):
    (job,) = planned("p.yml", "- Hello")
    assert not finished(job, tmp_path / "out")
    for facts, expected in [
        ({}, True),
        ({"identity": "other"}, False),
        ({"identity": "absent"}, False),
        ({"error": "ValueError: x"}, False),
    ]:
        write_report(tmp_path / "out", job, **facts)
        assert finished(job, tmp_path / "out") is expected
    (tmp_path / "out" / job.slug / "report.json").write_text("{", encoding="utf-8")
    assert not finished(job, tmp_path / "out")
