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
import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from running import PATIENCE, write_notebook

import helpers
import llama_reports
from helpers import InputError, ask, attribute
from helpers.attribution import METHODS
from helpers.models import tiny_llama
from llama_reports import jobs as jobs_module
from llama_reports.checked import KEPT
from llama_reports.jobs import find_notebook, notebook_digest, plan
from llama_reports.prompts import LONGEST_LINE, Entry, open_entries, read_entries
from llama_reports.run import finished, run_report
from llama_reports.versions import code_version, model_digest

TEXTS = ("prompt", "id", "target", "foil", "answer", "units", "evidence", "notebook")
LISTS = ("methods", "sources", "options")
MESSAGE = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})
SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in TEXTS]
    + [(name, pyarrow.bool_()) for name in ("chat", "raw")]
    + [(name, pyarrow.list_(pyarrow.string())) for name in LISTS]
    + [("messages", pyarrow.list_(MESSAGE))]
)


def as_csv(entries):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Entry.model_fields))
    writer.writeheader()
    for entry in entries:
        cells = {"methods": " ".join(entry.get("methods", []))}
        cells |= {
            name: json.dumps(entry[name])
            for name in ("messages", "options", "sources")
            if name in entry
        }
        writer.writerow(entry | cells)
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
content = text.filter(str.strip)
words = st.text("abcdefgh", min_size=1, max_size=5)
said = st.fixed_dictionaries({"role": st.just("user"), "content": content})
heard = st.fixed_dictionaries({"role": st.just("assistant"), "content": content})
asked = st.one_of(  # who asks, and in what form
    st.fixed_dictionaries(
        {"prompt": content}, optional={"chat": st.booleans(), "raw": st.just(False)}
    ),
    st.fixed_dictionaries({"prompt": content.map("Read this. {} Think.".format)}).map(
        lambda entry: entry | {"sources": ["Read this."]}
    ),
    st.fixed_dictionaries({"messages": st.tuples(said).map(list)}),
    st.fixed_dictionaries({"messages": st.tuples(said, heard, said, heard).map(list)}),
)
explained = st.one_of(  # what is explained
    st.fixed_dictionaries({}, optional={"target": words}),
    st.fixed_dictionaries({"target": words, "foil": words.map(str.upper)}),
    st.fixed_dictionaries({"answer": words}),
    st.fixed_dictionaries({"options": words.map(lambda word: [word, word.upper()])}),
    st.fixed_dictionaries({"options": words.map(lambda word: [word, f"z{word}", word.upper()])}),
)
more = st.fixed_dictionaries(
    {},
    optional={
        "id": st.from_regex(r"[a-z][a-z0-9_.]{0,8}[a-z]", fullmatch=True).filter(
            lambda name: name not in ("nan", "null")  # which a cell of CSV holds for nothing
        ),
        "units": st.sampled_from(["tokens", "words", "sentences", "turns"]),
        "methods": st.lists(st.sampled_from(sorted(METHODS)), min_size=1, max_size=3),
    },
)
entry = st.tuples(asked, explained, more).map(lambda parts: parts[0] | parts[1] | parts[2])


@given(entries=st.lists(entry, min_size=1, max_size=4))
@example(
    entries=[{"prompt": 'a "quoted", b\nand\tmore', "target": " "}, {"prompt": "- #'{x}: &*!"}]
)
@settings(max_examples=30, deadline=None)
def test_the_same_entries_in_four_formats_are_the_same_jobs(
    entries, tiny_folder, quick_notebook, tmp_path_factory
):
    folder, found = tmp_path_factory.mktemp("formats"), []
    given = {"model": str(tiny_folder), "notebook": quick_notebook()}
    for suffix, write in FORMATS.items():
        (folder / f"prompts.{suffix}").write_bytes(write(entries))
        try:
            jobs = list(plan(folder / f"prompts.{suffix}", **given))
        except InputError as error:  # asked twice, or two of an id: the same entries in all
            jobs = str(error).splitlines()[0].split(":")[1]
        found.append(jobs)
    assert found[0] == found[1] == found[2] == found[3]
    if isinstance(found[0], list):
        for job, entry in zip(found[0], entries, strict=True):
            said = list(entry.get("messages", []))
            is_answer = not {"target", "answer", "options"} & entry.keys() and len(said) == 4
            answer = said.pop()["content"] if is_answer else entry.get("answer")
            assert job.asked["prompt"] == said or entry.get("prompt")
            assert job.asked["answer"] == answer
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
            'prompt,target,foil\n"a\nb",c,\nx,ab,ab\n',
            "p.csv, line 4, row 2, column 'foil':",
            "is the target itself",
        ),
        ("p.csv", "prompt,chat\nHi,perhaps\n", "line 2, row 1, column 'chat':", "valid boolean"),
        ("p.csv", "prompt,foil\n\nHi\n", "p.csv, line 3, row 1:", "1 cells and the header 2"),
        ("p.csv", "prompt,foil\nHi,a,b\n", "p.csv, line 2, row 1:", "3 cells and the header 2"),
        ("p.csv", 'prompt\n"a"b\nHi\n', "p.csv, line 2, row 1:", "not CSV"),
        ("p.csv", 'prompt\nHi\n"never\nclosed\n', "p.csv, line 3, row 2:", "not CSV"),
        ("p.csv", "prompt,target\n,a\n", "line 2, row 1, column 'prompt':", "'prompt' is missing"),
        ("p.csv", b"prompt\nHi\nM\xfcnchen\n", "p.csv, line 3, row 2:", "not UTF-8 (byte 0xfc)"),
        ("p.csv", b"prompt\na\0b\n", "p.csv, line 2, row 1:", "NUL byte"),
        ("p.csv", f"prompt\n{'x' * 140_000}\n", "p.csv, line 2, row 1:", "field limit"),
        ("p.jsonl", '"Hi"\n{"prompt": "x", "foil": ""}', "line 2, key 'foil':", "must be text"),
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
        ("p.jsonl", r'{"prompt": "a", "foil": "\udc80"}', "line 1, key 'foil':", "half of a"),
        (
            "p.jsonl",
            '{"prompt": "a", "evidence": "%s"}' % ("b" * 2000),
            "key 'evidence':",
            "most 1000",
        ),
        (
            "p.yml",
            "- Hi\n- {prompt: x, target: yes}",
            "p.yml, line 2, entry 2 ('x'), key 'target':",
            "True is no text here: put it in quotes",
        ),
        ("p.yml", "- Hi\n- {prompt: x, prompt: y}", "p.yml, line 2, entry 2:", "is there twice"),
        ("p.yml", "- Hi\n- 2024-05-45\n", "p.yml, line 2, entry 2:", "put the text in quotes"),
        ("p.yml", f"- Hi\n- {'9' * 5000}\n", "p.yml, line 2, entry 2:", "put the text in quotes"),
        ("p.yml", "- Hi\n- ? [a]\n  : b\n", "p.yml, line 2, entry 2:", "not YAML"),
        (
            "p.parquet",
            [{"prompt": "a"}, {"prompt": "b", "foil": ""}],
            "row 2, column 'foil':",
            "must be text",
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
        ("p.csv", "text,target\nHi,a\n", "line 1: the column 'prompt' is missing"),
        ("p.csv", "The sky is\nHi\n", "and here they are The sky is"),
        ("p.csv", "prompt|target\nHi|a\n", "parted by commas, semicolons or tabs"),
        ("p.csv", "prompt,PROMPT \na,b\n", "a column is there twice"),
        ("p.csv", "prompt,label,label\na,b,c\n", "a column is there twice"),
        ("p.csv", ",".join(["prompt", *map(str, range(300))]), "It has 301 names, and a file"),
        ("p.csv", "prompr\nHi\n", "line 1: The column 'prompr' is unknown: write 'prompt' if that"),
        (
            "p.csv",
            "prompt;Tarhet\nHi;a\n",
            "line 1: The column 'Tarhet' is unknown: write 'target'",
        ),
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
    table = pyarrow.table({"prompt": ["a"], "foils": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "other.parquet")
    assert "column 'foils' is unknown: write 'foil'" in refused(
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


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process, as Linux can")
def test_aliases_of_aliases_do_not_fill_the_memory(tmp_path):
    files = [tmp_path / f"{name}.yml" for name in BOMBS]
    for file in files:
        file.write_text("- fine\n" + BOMBS[file.stem], encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", READ, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    for file in files:
        assert any(file.name in line and "10,000 parts" in line for line in told), told
    assert len(done.stdout) < 10_000


# --- what an entry may ask ---------------------------------------------------------------------


@pytest.fixture
def one(planned, quick_notebook):
    """A function: the only job of a file, for a notebook that takes every key."""

    def one(name, content):
        (job,) = planned(name, content, notebook=quick_notebook())
        return job

    return one


@pytest.mark.parametrize(
    "name, content, target",
    [
        ("p.yml", "- {prompt: x, target: 1066}", "1066"),
        ("p.yml", "- {prompt: x, target: 0x10}", "0x10"),
        ("p.yml", "- {prompt: x, target: 1.50}", "1.50"),
        ("p.yml", "- {prompt: x, target: 1066-10-14}", "1066-10-14"),
        ("p.yml", "- {prompt: x, target: 'yes'}", "yes"),
        ("p.jsonl", '{"prompt": "x", "target": 1066}', "1066"),
        ("p.jsonl", '{"prompt": "x", "target": 1.50}', "1.50"),
        ("p.csv", "prompt,target\nx,1066\n", "1066"),
    ],
)
def test_a_number_is_the_text_that_was_written(one, name, content, target):
    assert one(name, content).parameters["target"] == target


@pytest.mark.parametrize("target", ["true", "null_", "1e5", "[1]", "Infinity"])
def test_what_is_no_text_is_told_to_be_quoted(refused, target):
    if target == "null_":
        message = refused("p.yml", "- {prompt: x, target: {a: b}}")
    else:
        message = refused("p.jsonl", f'{{"prompt": "x", "target": {target}}}')
    assert "key 'target':" in message and "put it in quotes" in message


def test_an_answer_is_a_number_of_tokens_or_a_text(one):
    for name, content, answer, expected in [
        ("p.yml", "- {prompt: x, answer: true}", 40, {"answer": 40}),
        ("p.yml", "- {prompt: x, answer: 7}", 7, {"answer": 7}),
        ("p.yml", "- {prompt: x, answer: '7'}", "7", {"answer_text": "7"}),
        ("p.yml", "- {prompt: x, answer: no}", None, {}),
        ("p.csv", "prompt,answer\nx,True\n", 40, {"answer": 40}),
        ("p.csv", "prompt,answer\nx,07\n", 7, {"answer": 7}),
        ("p.csv", "prompt,answer\nx,yes sir\n", "yes sir", {"answer_text": "yes sir"}),
    ]:
        job = one(name, content)
        assert job.asked["answer"] == answer
        found = {key: value for key, value in job.parameters.items() if "answer" in key}
        assert found == expected


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of Latvia?"},
    {"role": "assistant", "content": "It is"},
]
BATCH = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions"}


def test_messages_are_read_from_every_format_and_from_openais_lines(one, tmp_path):
    parts = [{"type": "text", "text": "Capital of "}, {"type": "text", "text": "Latvia?"}]
    other = [CHAT[0], {"role": "user", "content": parts, "name": "me"}, CHAT[2] | {"weight": 0}]
    entry = {"messages": CHAT, "target": "Riga"}
    native = pyarrow.table({"messages": [CHAT], "target": ["Riga"]})
    pyarrow.parquet.write_table(native, tmp_path / "native.parquet")
    body = {"target": "Riga", "body": {"model": "gpt", "messages": CHAT}}
    jobs = [
        one("p.yml", yaml.safe_dump([entry])),
        one("p.jsonl", json.dumps(entry | {"messages": other})),
        one("p.jsonl", json.dumps(BATCH | body)),
        one("p.csv", as_csv([entry])),
        one("p.parquet", (tmp_path / "native.parquet").read_bytes()),
    ]
    for job in jobs:
        assert job.parameters["messages"] == job.asked["prompt"] == CHAT
        assert "prompt" not in job.parameters
        assert job.prompt == "system: Be brief.\nuser: Capital of Latvia?\nassistant: It is"
    assert len({job.question for job in jobs}) == 1
    assert [job.slug for job in jobs] == ["capital-of-latvia"] * 2 + ["r1"] + [jobs[0].slug] * 2


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_answer_at_the_end_of_messages_is_explained_unless_something_else_is(one, suffix):
    def asked(**more):
        return one(f"p.{suffix}", FORMATS[suffix]([{"messages": CHAT, **more}])).asked

    assert asked()["prompt"] == CHAT[:2] and asked()["answer"] == "It is"  # as in fine-tuning
    for more, answer in ({"target": "x"}, None), ({"foil": "x"}, None), ({"answer": "y"}, "y"):
        assert asked(**more)["prompt"] == CHAT and asked(**more)["answer"] == answer


def test_without_an_answer_the_end_of_messages_is_a_beginning(one):
    job = one("p.jsonl", json.dumps({"messages": CHAT, "answer": False}))
    assert job.asked["prompt"] == CHAT and "answer" not in job.parameters


def test_a_request_of_a_batch_carries_what_it_says_beside_the_messages(one):
    body = {"model": "gpt", "temperature": 0.5, "chat": 1, "messages": CHAT[:2]}
    job = one("p.jsonl", json.dumps(BATCH | {"body": body, "foil": "Oslo"}))
    assert (job.slug, job.asked["prompt"], job.asked["foil"]) == ("r1", CHAT[:2], "Oslo")
    about = {"model": "gpt", "temperature": 0.5, "body.chat": 1}
    assert job.meta == {name: BATCH[name] for name in ("method", "url")} | about


# --- names of keys, and what is carried --------------------------------------------------------


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.csv", "Prompt,TARGET , Label\nHi,a,x\n"),
        ("p.csv", "Prompt;target;Label\nHi;a;x\n"),
        ("p.csv", '"prompt";"target";"Label"\n"Hi";"a";"x"\n'),
        ("p.csv", "sep=;\nprompt;target;Label\nHi;a;x\n"),
        ("p.csv", "\nprompt\tLabel\ttarget\nHi\tx\ta\n"),
        ("p.tsv", "prompt\ttarget\tLabel\nHi\ta\tx\n"),
        ("p.csv", ",prompt,target,Label\n0,Hi,a,x\n"),
        ("p.csv", "Unnamed: 0.1;Unnamed: 0;prompt;target;Label\n0;17;Hi;a;x\n"),
        ("p.csv", "prompt,target,Label,,\nHi,a,x,,\n,,,,\n"),
        ("p.csv", "prompt,target,Label,foil,chat,answer\nHi,a,x,NaN,<NA>,null\n"),
        ("p.yml", "- {PROMPT: Hi, Target: a, Label: x, foil: .nan, chat: null}"),
        ("p.jsonl", '{"Prompt": "Hi", "target ": "a", "Label": "x", "foil": NaN, "chat": null}'),
        ("p.jsonl", '{"Unnamed: 0": 4, "prompt": "Hi", "target": "a", "Label": "x"}'),
    ],
)
def test_names_in_any_case_and_cells_however_they_are_parted(one, name, content):
    job = one(name, content)
    assert job.parameters == {"prompt": "Hi", "target": "a"} | {
        key: job.parameters[key] for key in ("model_name", "output_dir")
    }
    assert job.meta == {"Label": "x"}


def test_a_data_frame_is_read_however_it_is_saved(one, planned, tmp_path):
    frame = pd.DataFrame({"prompt": ["Ho", "Hi"], "answer": [None, 3], "n": [1.5, np.nan]}, [4, 7])
    kept = frame.iloc[[1]]
    kept.to_parquet(tmp_path / "f.parquet")
    assert "__index_level_0__" in pyarrow.parquet.read_schema(tmp_path / "f.parquet").names
    kept.to_csv(tmp_path / "again.csv")
    jobs = [
        one("p.csv", kept.to_csv()),
        one("p.csv", kept.to_csv(na_rep="NaN", sep=";")),
        one("p.csv", pd.read_csv(tmp_path / "again.csv").to_csv(sep="\t")),
        one("p.jsonl", kept.to_json(orient="records", lines=True)),
        one("p.parquet", (tmp_path / "f.parquet").read_bytes()),
    ]
    for job in jobs:
        assert (job.prompt, job.asked["answer"]) == ("Hi", 3)
        assert job.meta in ({}, {"n": None})
    first, second = planned("p.csv", frame.to_csv())
    assert (first.meta, second.meta) == ({"n": "1.5"}, {"n": None})
    assert first.asked["answer"] is None


@pytest.mark.parametrize("said", ["NA", "nan", "NULL", "None"])
def test_a_prompt_is_a_text_whatever_it_says(one, refused, said):
    assert one("p.csv", f"prompt,target\n{said},a\n").prompt == said
    assert one("p.csv", f"prompt,label\nHi,{said}\n").meta in ({"label": said}, {})
    for column in ("target", "foil", "answer", "evidence"):
        if said in ("NA", "None"):
            message = refused("p.csv", f"prompt,{column}\nHi,{said}\n")
            assert f"row 1, column {column!r}: {said!r} may be a text or no value" in message
        else:
            assert column not in one("p.csv", f"prompt,{column}\nHi,{said}\n").parameters
    assert one("p.csv", f"prompt,target\nHi, {said}\n").parameters["target"] == f" {said}"


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("prompt,\nHi,a\n", "'Unnamed: 1', counted from 0, has no name, and 'a' is no row"),
        (
            "prompt,\nHi,1066\n",
            "'Unnamed: 1', counted from 0, has no name, and '1066' is no",
        ),  # a target without its name
        (",prompt\nfirst,Hi\n", "'Unnamed: 0', counted from 0, has no name, and 'first' is"),
        ("prompt;target\nHi;a;b\n", "put a text with semicolons in quotes"),
        ("prompt\ttarget\nHi\n", "put a text with tabs in quotes"),
    ],
)
def test_a_cell_that_no_name_explains_is_told(refused, content, complaint):
    message = refused("p.csv", content)
    assert "p.csv, line 2, row 1: " in message and complaint in message


def test_text_that_holds_the_other_characters_is_one_cell(planned):
    for content, prompt in [
        ("prompt\na;b\tc\n", "a;b\tc"),
        ('prompt\n"a,b"\n', "a,b"),
        ("prompt;label\na,b;c\n", "a,b"),
        ('label,prompt\n"x;y\tz","a;b"\n', "a;b"),
        ('"note; and, more";prompt\n1;"a;b, c"\n', "a;b, c"),
    ]:
        assert [job.prompt for job in planned("p.csv", content)] == [prompt]


CARRIED = {"label": "x", "n": 3, "share": 0.5, "tags": [{"b": ["a"]}], "seen": True}


@pytest.mark.parametrize("suffix", ["yml", "jsonl", "parquet"])
def test_other_keys_are_carried_as_they_are_and_ask_nothing(one, suffix, tmp_path):
    entries = [{"prompt": "Hi", "id": "a", **CARRIED}]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), tmp_path / "c.parquet")
        content = (tmp_path / "c.parquet").read_bytes()
    else:
        content = FORMATS[suffix](entries)
    job = one(f"p.{suffix}", content)
    assert job.meta == CARRIED
    plain = one("p.jsonl", '{"prompt": "Hi", "id": "a"}')
    assert (job.question, job.identity) == (plain.question, plain.identity)
    assert plain.meta == {}


def test_every_job_of_a_plan_carries_the_same_names(planned):
    jobs = planned("p.jsonl", '{"prompt": "a", "x": 1}\n"b"\n{"prompt": "c", "y": "2", "x": null}')
    assert jobs.carried == ("x", "y")
    assert [job.meta for job in jobs] == [
        {"x": 1, "y": None},
        dict.fromkeys("xy"),
        {"x": None, "y": "2"},
    ]


def test_what_is_carried_is_plain_text_and_numbers(one, refused, tmp_path):
    job = one(
        "p.yml", "- {prompt: Hi, day: 2024-05-04, 7: 0x10, inf: .inf, void: .nan, b: !!binary aGk=}"
    )
    assert job.meta == {"day": "2024-05-04", "7": 16, "inf": "inf", "b": "b'hi'"}
    assert json.loads(json.dumps(job.meta, allow_nan=False)) == job.meta
    for entry, complaint in [
        (r'{"prompt": "a", "label": "\ud800"}', "key 'label': The text has half of a surrogate"),
        (r'{"prompt": "a", "tags": ["\u0000"]}', "key 'tags': The text has a NUL character"),
        ('{"prompt": "a", "deep": ' + "[" * 50 + "]" * 50 + "}", "key 'deep': It is nested more"),
        (json.dumps({"prompt": "a"} | {f"n{i}": 1 for i in range(101)}), "'n100' is one name too"),
        ('{"prompt": "a", "Unnamed: 0": [1]}', "no row's number: name it"),
        ('{"prompt": "a", "Prompt": "b"}', "The key 'prompt' is there twice: remove one."),
    ]:
        assert complaint in refused("p.jsonl", entry)

    for name in ("n", "'Unnamed: 0'"):
        message = refused("p.yml", f"- {{{name}: 0x{'f' * 5000}, prompt: a}}")
        assert "p.yml, line 1, entry 1" in message and "put it in quotes" in message


@pytest.mark.parametrize(
    "name, meant",
    [
        ("prompr", "prompt"),
        ("tarhet", "target"),
        ("Fiol", "foil"),
        ("option", "options"),
        ("source", "sources"),
        ("unit", "units"),
        ("masseges", "messages"),
        ("target_ids", "target"),
        ("answerText", "answer"),
        ("tar_get", "target"),
    ],
)
def test_a_misspelt_key_is_refused_and_names_the_key_that_was_meant(refused, one, name, meant):
    cure = f"is unknown: write {meant!r} if that is meant, or 'meta.{name}' to carry it along."
    for suffix in ("yml", "jsonl"):
        message = refused(f"p.{suffix}", FORMATS[suffix]([{"prompt": "Hi", name: "a"}]))
        assert f"The key {name!r} {cure}" in message
    message = refused("p.csv", f"prompt,{name}\nHi,a\n")
    assert f"p.csv, line 1: The column {name!r} {cure}" in message
    assert one("p.csv", f"prompt,meta.{name}\nHi,a\n").meta == {f"meta.{name}": "a"}


@pytest.mark.parametrize(
    "name",
    ["label", "category", "split", "fold", "idx", "note", "prompt_id", "text", "carried", "title"],
)
def test_a_name_that_is_like_no_key_is_carried(one, name):
    assert one("p.csv", f"prompt,{name}\nHi,a\n").meta == {name: "a"}


def test_two_options_are_target_and_foil_and_more_are_compared(one, refused):
    for entry, expected in [
        ({"options": [" a", " b"]}, (" a", " b")),
        ({"options": [" a", " b"], "target": " b"}, (" b", " a")),
        ({"options": [1, 2]}, ("1", "2")),
    ]:
        for suffix in ("yml", "jsonl", "csv"):
            job = one(f"p.{suffix}", FORMATS[suffix]([{"prompt": "x", **entry}]))
            assert (job.parameters["target"], job.parameters["foil"]) == expected
            assert "options" not in job.parameters
    for entry, named in [
        ({"options": [" a", " b", " c"]}, None),
        ({"options": [" a", " b", " c"], "target": " b"}, " b"),
        ({"options": [1, 2.5, "a"]}, None),
    ]:
        for suffix in ("yml", "jsonl", "csv"):
            job = one(f"p.{suffix}", FORMATS[suffix]([{"prompt": "x", **entry}]))
            assert job.parameters["options"] == list(map(str, entry["options"]))
            assert job.parameters.get("target") == named and "foil" not in job.parameters
    job = one("p.yml", "- {prompt: x, options: [1_000, 0x10, 2026-11-27]}")
    assert job.parameters["options"] == ["1_000", "0x10", "2026-11-27"]  # as they are written
    asks = {"prompt": "x", "notebook": "08_comparison", "options": ["a", "b", "c"]}
    assert "08_comparison has no parameter 'options'" in refused("p.jsonl", json.dumps(asks))
    for entry, complaint in [
        ({"options": ["a"]}, "Options are compared with each other: give at least two."),
        ({"options": ["a", "b", "a"]}, "The option 'a' is there twice"),
        ({"options": ["a", "a"]}, "The option 'a' is there twice"),
        ({"options": ["c", "b", "ab", "a"]}, "The options 'a' and 'ab' begin alike and one of"),
        ({"options": ["b", "", "a"]}, "The option is empty: it must be text"),
        ({"options": [*map(str, range(100, 121))]}, "There are 21 options: give at most 20."),
        ({"options": ["a", "b", "c"], "target": "d"}, "The target 'd' is none of the options"),
        ({"options": "a or b"}, "It is no list: write one"),
        ({"options": ["a", "b"], "target": "c"}, "The target 'c' is none of the options"),
        ({"options": ["a", "b"], "foil": "c"}, "It has options and a foil"),
        ({"options": ["a", "b"], "answer": 3}, "It has options and an answer"),
    ]:
        message = refused("p.jsonl", json.dumps({"prompt": "x", **entry}))
        assert f"p.jsonl, line 1, key 'options': {complaint}" in message


# --- what a notebook takes ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        'prompt = "2+2="',
        '# a = b\nprompt: str = "x"  # by = default',
        "prompt: str",
        "prompt = target = None",
        'prompt, target = "a == b", ""',
        'prompt = """two\nlines = here"""',
        "prompt = dict(a=1, b=2)['a']",
        'import os\nif True:\n    x = 1\nprompt = os.environ.get("a=b", "")',
        '%matplotlib inline\nprompt = "x"',
        '%load_ext autoreload\n!ls\nprompt = "2+2="',
    ],
)
def test_the_parameters_of_a_notebook_are_what_its_cell_assigns(planned, tmp_path, cell):
    path = write_notebook(tmp_path / "own.ipynb", cell)
    (job,) = planned("p.jsonl", '"Hi"', notebook=str(path))
    assert job.parameters == {"prompt": "Hi"}


@pytest.mark.parametrize(
    "cell",
    ["# prompt = 1", "def f():\n    prompt = 1", 'text = """\nprompt = 1\n"""', "f(prompt=1)", ""],
)
def test_a_notebook_that_assigns_no_prompt_is_refused(refused, tmp_path, cell):
    path = write_notebook(tmp_path / "own.ipynb", cell)
    message = refused("p.jsonl", '"Hi"', notebook=str(path))
    assert "takes no prompt" in message and "assign prompt in a cell with the tag" in message
    path.write_text("{}", encoding="utf-8")
    assert "not a notebook" in refused("p.jsonl", '"Hi"', notebook=str(path))


def test_a_report_of_such_a_notebook_is_made_and_holds_what_was_carried(planned, tmp_path):
    path = write_notebook(tmp_path / "own.ipynb", 'prompt = "2+2="', "print(prompt)")
    (job,) = planned("p.csv", ";Prompt;model\n0;1+1=;x\n", notebook=str(path))
    facts = run_report(job, tmp_path / "out", engine=None)
    assert facts["error"] is None and facts["meta"] == {"model": "x"} and facts["model"] != "x"
    kept = json.loads((tmp_path / "out" / job.slug / "report.json").read_text(encoding="utf-8"))
    assert kept["meta"] == facts["meta"]
    made = nbformat.read(tmp_path / "out" / job.slug / "report.ipynb", 4)
    assert made.cells[-1].outputs[0]["text"] == "1+1=\n"


# --- what an entry cannot ask ------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, complaint",
    [
        ({"messages": [CHAT[0]]}, "key 'messages': The user says nothing"),
        ({"messages": [CHAT[1], CHAT[0]]}, "key 'messages': Message 1 is a system message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "Message 0 has the role 'tool'"),
        ({"messages": [CHAT[1] | {"content": ""}]}, "key 'messages': The content of message 0 is"),
        ({"messages": [CHAT[1] | {"content": "a\0"}]}, "key 'messages': The text has a NUL"),
        ({"messages": []}, "key 'messages':"),
        ({"messages": "hello"}, "key 'messages': It is no list"),
        ({"messages": CHAT[1:], "prompt": "x"}, "key 'messages': It has a prompt and messages"),
        ({"target": "x"}, "key 'prompt': The key 'prompt' is missing"),
        ({"prompt": "ab", "sources": ["y"]}, "key 'sources': Source 0, 'y', does not stand in"),
        ({"prompt": "x x", "sources": ["x"]}, "key 'sources': Source 0, 'x', stands 2 times"),
        ({"prompt": "abc", "sources": ["ab", "bc"]}, "key 'sources': Sources 0 and 1 overlap"),
        ({"prompt": "x", "sources": ["x", None]}, "key 'sources': Number 1: None is no text"),
        ({"prompt": "x", "methods": ["random", "no"]}, "key 'methods': Number 1: There is no me"),
        ({"prompt": "ab", "units": "paragraphs"}, "key 'units': There are no units 'paragraphs'"),
        ({"prompt": "x", "answer": 0}, "key 'answer': The answer 0 is neither a text nor"),
        ({"prompt": "x", "answer": 1.5}, "key 'answer': 1.5 is no text here"),
        ({"prompt": "x", "answer": ""}, "key 'answer': The answer is empty"),
        ({"prompt": "x", "answer": 5, "target": "a"}, "key 'answer': Give a target or an answer"),
        ({"prompt": "x", "answer": 5, "foil": "a"}, "key 'answer': An answer has no foil"),
        ({"prompt": "x", "answer": 5000}, "5,000 more behind it and the model reads at most 2,048"),
        ({"prompt": "x", "raw": True, "chat": True}, "key 'raw': raw and chat exclude each other"),
        ({"prompt": "this hill", "evidence": "is"}, "key 'evidence': The evidence 'is' is not a"),
        ({"prompt": "x", "evidence": ""}, "key 'evidence': The evidence '' is not a whole word"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_with_the_key(
    refused, quick_notebook, entry, complaint
):
    message = refused("p.jsonl", json.dumps(entry), notebook=quick_notebook())
    assert complaint in message and message.count("\n") == 1


def test_evidence_is_sought_in_what_was_written_and_not_in_the_template(one, refused, tmp_path):
    assert one("p.jsonl", json.dumps({"messages": CHAT, "evidence": "Latvia"}))
    assert one("p.jsonl", '{"prompt": "你好世界", "evidence": "世界"}')
    entry = json.dumps({"prompt": "Hi", "chat": True, "evidence": "assistant"})
    assert "not a whole word of the prompt" in refused("p.jsonl", entry)


def test_a_token_without_an_embedding_is_refused(tiny, tmp_path):
    model, tokenizer = tiny_llama()
    tokenizer.add_tokens(["Zork"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    for entry, role in ("The Zork", "prompt"), ({"prompt": "x", "target": "Zork"}, "target"):
        (tmp_path / "p.jsonl").write_text(json.dumps(entry))
        with pytest.raises(InputError, match=f"The {role} holds .*no embedding"):
            plan(tmp_path / "p.jsonl", model=str(tmp_path / "model"))


def test_a_key_that_the_notebook_does_not_take_is_refused(refused, tmp_path):
    path = write_notebook(tmp_path / "few.ipynb", "prompt = ''")
    for entry, name in (
        ({"messages": CHAT}, "messages"),
        ({"prompt": "x", "answer": "y"}, "answer"),
        ({"prompt": "x", "units": "words"}, "units"),
    ):
        message = refused("p.jsonl", json.dumps(entry), notebook=str(path))
        assert f"key {name!r}: The notebook few has no parameter" in message


def test_the_sizes_of_a_plan_are_those_of_its_questions(planned, quick_notebook, tiny):
    entries = [
        {"prompt": "two words", "units": "words", "target": "y"},
        {"prompt": "x", "target": "abc"},
        {"prompt": "x", "target": "ab", "foil": "cde"},
        {"prompt": "x", "answer": 4},
        {"messages": CHAT, "units": "turns", "answer": False},
    ]
    jobs = planned("p.jsonl", "\n".join(map(json.dumps, entries)), notebook=quick_notebook())
    assert jobs.outputs.tolist() == [1, 3, 4, 4, 1]
    for job, tokens, units, outputs in zip(
        jobs, jobs.tokens, jobs.units, jobs.outputs, strict=True
    ):
        question = ask(*tiny, **job.asked)
        result = attribute(tiny[0], question, "relevance", each=True)
        assert (tokens, units) == (question.input_ids.shape[1], len(result.scores))
        assert outputs == len(result.outputs)


def test_the_default_notebook_takes_every_key(planned):
    entries = [
        {"prompt": "one two", "target": "a", "foil": "b", "units": "words", "evidence": "two"},
        {"prompt": "<|im_start|>x", "raw": True, "answer": 3},
        {"prompt": "Read. Think.", "sources": ["Read."], "chat": True, "answer": "y"},
        {"messages": CHAT, "methods": ["random"]},
    ]
    with_bos = entries.pop(1)  # the toy's tokenizer adds no such token by itself
    assert len(planned("p.jsonl", "\n".join(map(json.dumps, [*entries, with_bos])))) == 4


# --- what is held ------------------------------------------------------------------------------


def test_a_plan_can_be_read_again_and_holds_a_few_numbers_a_prompt(planned):
    jobs = planned("p.jsonl", "\n".join(json.dumps(f"Prompt number {i}") for i in range(300)))
    assert list(jobs) == list(jobs) and len(jobs) == 300
    assert jobs.tokens.tolist() == [job.tokens for job in jobs]
    assert jobs.tokens[0] == len("Prompt number 0")  # a token a byte
    held = [jobs.tokens, jobs.units, jobs.outputs, jobs.kinds, jobs._levels]
    assert len(pickle.dumps(held)) < 300 * 32


CARRIES = [
    {"prompt": "1066", "id": "a", "Model name": "x", "_fields_set": [1, {"y": None}], "answer": 3},
    {"messages": CHAT, "methods": ["random"], "units": "turns", "score": 0.5},
    {"prompt": "Ünï\u2028codé\n", "options": [" a", " b"], "chat": True},
]


def test_a_kept_check_says_what_the_check_said(planned, tmp_path, monkeypatch):
    content = "\n".join(map(json.dumps, CARRIES))
    jobs = planned("p.jsonl", content, out=tmp_path / "out")
    jobs.keep()
    monkeypatch.setattr("llama_reports.jobs.load_tokenizer", None)  # which no second check could do
    again = planned("p.jsonl", content, out=tmp_path / "out")
    assert list(again) == list(jobs) and len(jobs) == 3
    assert (again.asked, again.carried, again.replaced) == (jobs.asked, jobs.carried, 0)
    for name in ("tokens", "units", "outputs", "kinds"):
        assert getattr(again, name).tolist() == getattr(jobs, name).tolist()


def test_a_kept_check_names_places_in_the_file(planned, refused, tmp_path):
    content = "- {id: one, prompt: Hi}\n\n- {id: two, prompt: Ho}\n"
    planned("p.yml", content, out=tmp_path / "out").keep()
    (tmp_path / "out" / "two").mkdir()  # which is no report
    assert "p.yml, line 3, entry 2 ('two'), key 'id'" in refused(
        "p.yml", content, out=tmp_path / "out"
    )


@pytest.mark.parametrize(
    "other", [{"methods": ["random"]}, {"notebook": "08_comparison"}, {"folders": False}]
)
def test_a_check_for_something_else_is_made_again(planned, tmp_path, monkeypatch, other):
    planned("p.jsonl", '"Hi"\n"Ho"\n', out=tmp_path / "out").keep()
    kept = (tmp_path / "out" / KEPT).read_bytes()
    changed = planned("p.jsonl", '"Hi"\n"Ha"\n', out=tmp_path / "out")
    changed.keep()
    assert [job.prompt for job in changed] == ["Hi", "Ha"]
    assert (tmp_path / "out" / KEPT).read_bytes() != kept
    monkeypatch.setattr("llama_reports.jobs.load_tokenizer", None)
    with pytest.raises(TypeError):
        planned("p.jsonl", '"Hi"\n"Ha"\n', out=tmp_path / "out", **other)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-9], lambda b: b"x" * len(b)])
def test_a_damaged_check_is_made_again(planned, tmp_path, damage):
    jobs = planned("p.jsonl", '"Hi"\n"Ho"\n', out=tmp_path / "out")
    jobs.keep()
    kept = tmp_path / "out" / KEPT
    kept.write_bytes(damage(kept.read_bytes()))
    again = planned("p.jsonl", '"Hi"\n"Ho"\n', out=tmp_path / "out")
    assert list(again) == list(jobs)
    again.keep()
    assert pyarrow.parquet.read_table(kept).num_rows == 2


def test_what_runs_is_what_was_checked(planned, tmp_path):
    jobs = planned("p.jsonl", '"Hi"\n"Ho"\n', out=tmp_path / "out")
    planned("p.jsonl", '"Other"\n', out=tmp_path / "out").keep()
    assert [job.prompt for job in jobs] == ["Hi", "Ho"]


def test_a_file_that_changes_while_it_is_checked_is_refused(planned, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"Hi"\n"Ho"\n', encoding="utf-8")

    def growing():
        yield from open_entries(path)
        with path.open("a") as stream:
            stream.write('"More"\n')

    with pytest.raises(InputError, match="has changed while it was checked"):
        planned("p.jsonl", '"Hi"\n"Ho"\n', rows=growing())


def test_a_refused_file_is_not_kept(refused, tmp_path):
    assert refused("p.jsonl", '{"prompt": "Hi", "foil": "a", "target": "a"}', out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_file_is_told_before_torch_is_imported(tmp_path):
    path = tmp_path / "p.yml"
    path.write_text("- {prompt: Hi, targett: a}\n- Ho\n- {foil: b}\n", encoding="utf-8")
    code = (
        "import sys\nfrom llama_reports.command import main\ntry:\n    main()\nfinally:\n"
        "    print({'torch', 'transformers', 'papermill', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 2 and done.stdout == "set()\n"
    assert "2 of 3 entries cannot run" in done.stderr and "line 3, entry 3" in done.stderr


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
    "plan.parquet",
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
    write_report(out, first, question="absent")  # whose question nobody knows
    assert next(iter(planned("four.yml", "- Hello", out=out))).slug == f"hello-{again.question[:6]}"


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
        '{"prompt": "Hi", "evidence": "Hi"}',
        '{"prompt": "Hi", "raw": true}',
        '{"prompt": "Hi", "units": "words"}',
        '{"prompt": "Hi", "sources": ["Hi"]}',
        '{"prompt": "Hi", "answer": 3}',
        '{"prompt": "Hi", "answer": "3"}',
        '{"messages": [{"role": "user", "content": "Hi"}]}',
        '{"prompt": "Hi", "methods": ["saliency"]}',
    ]
    others = [one(entry) for entry in asked]
    assert len({job.question for job in [first, *others]}) == 1 + len(asked)
    assert one(asked[-1]).question == one(methods=["saliency"]).question

    (tmp_path / "report.ipynb").write_text("", encoding="utf-8")
    cells = nbformat.read(find_notebook("report"), 4)
    cells.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(cells, tmp_path / "report.ipynb")
    answered = [one(notebook=str(tmp_path / "report.ipynb")), one(dtype="bfloat16")]
    monkeypatch.setattr(jobs_module, "code_version", lambda *_: "another")
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
    from llama_reports import versions as provenance

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
    from llama_reports import versions as provenance

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
