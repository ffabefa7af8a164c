"""Reports over prompts: what is refused beforehand, what a run leaves, what it never does."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from running import option_rows

from helpers import InputError
from helpers.coloured import percent
from llama_reports.files import write_whole
from llama_reports.gallery import read_reports, write_index
from llama_reports.jobs import find_notebook, plan
from llama_reports.pages import report_page
from llama_reports.prompts import read_entries
from llama_reports.run import run_report
from llama_reports.two_runs import compare_runs

ROOT = Path(__file__).resolve().parents[2]


def prompts_file(folder, text):
    path = folder / "prompts.yml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder, text, **options):
    with pytest.raises(InputError) as caught:
        plan(prompts_file(folder, text), **options)
    return str(caught.value)


# --- the check before any run ------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, complaint",
    [
        ("- target: ' Rig'", "'prompt' is missing"),
        ("- prompt: Hi\n  tarhet: red", "'tarhet' is unknown"),
        ("- '  '", "prompt is empty"),
        ("- 42", "put the prompt in quotes"),
        ("- yes", "put the prompt in quotes"),
        ("- prompt: Hi\n  chat: maybe", "value of 'chat'"),
        ("- prompt: Hi\n  target: yes", "put it in quotes"),
        ("- prompt: Hi\n  target: ''", "must be text"),
        ("- prompt: Hi\n  target: ' a'\n  foil: ' a'", "is the target itself"),
        ("- prompt: Hi\n  methods: [magic]", "no method 'magic'"),
        ("- prompt: Hi\n  notebook: 99_magic", "no notebook '99_magic'"),
        ("- prompt: Hi\n  id: ../../etc", "cannot name a folder"),
        ("- prompt: Hi\n  notebook: 02_tokenization\n  foil: ' a'", "no parameter 'foil'"),
        ("- one\n- two\n- Hello\n", "asks the same as line 1"),
        ("- prompt: Hi\n  id: hello\n", "is that of line 1"),
        (f"- {'word ' * 9000}", "tokens long and the model reads at most 8,192"),
    ],
)
def test_bad_entry_is_named_with_its_line_and_nothing_is_started(tmp_path, entry, complaint):
    message = refusal(tmp_path, "- Hello\n\n" + entry)
    line = 5 if "asks the same" in complaint else 3
    assert (
        f"line {line}, entry" in message and complaint in message and "none was started" in message
    )


def test_all_bad_entries_are_told_at_once(tmp_path):
    message = refusal(tmp_path, "- ''\n- good\n- prompt: x\n  id: a/b\n")
    assert "2 of 3 entries" in message and "line 1" in message and "line 3" in message


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "must be a YAML list"),
        ("prompt: Hi", "must be a YAML list"),
        ("- 'unclosed", "not YAML"),
        ("- !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_file_that_is_no_list_of_prompts_is_refused(tmp_path, text, complaint):
    assert complaint in refusal(tmp_path, text)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no prompts file"):
        read_entries(tmp_path / "none.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_entries(tmp_path / "binary.yml")


def test_the_default_prompts_pass_the_check():
    jobs = plan(ROOT / "notebooks" / "prompts.yml")
    assert len(jobs) >= 5 and len({job.slug for job in jobs}) == len(jobs)


@given(prompts=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=4, unique=True))
@settings(max_examples=40, deadline=None)
def test_no_prompt_can_choose_a_folder_outside(prompts, tmp_path_factory):
    text = yaml.safe_dump([{"prompt": prompt} for prompt in prompts])
    try:
        jobs = plan(prompts_file(tmp_path_factory.mktemp("prompts"), text))
    except InputError:
        return
    slugs = [job.slug for job in jobs]
    assert len(set(slugs)) == len(slugs)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", slug) for slug in slugs)


# --- prompts as data, not code -----------------------------------------------------------------


@given(prompt=st.text(max_size=80))
@settings(max_examples=150, deadline=None)
def test_papermill_hands_any_prompt_over_unchanged(prompt):
    source = load_notebook_node(str(find_notebook("08_comparison")))
    source.cells = [c for c in source.cells if "parameters" in c.metadata.get("tags", [])]
    filled = parameterize_notebook(source, {"prompt": prompt}, kernel_name="python3")
    injected = [c for c in filled.cells if "injected-parameters" in c.metadata["tags"]]
    namespace = {}
    exec(injected[0].source, namespace)
    assert namespace["prompt"] == prompt


class _Text(html.parser.HTMLParser):
    """The text of a page's prompt block, and the names of all its elements."""

    def __init__(self):
        super().__init__()
        self.inside, self.text, self.elements = False, "", set()

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        self.inside |= tag == "blockquote"

    def handle_endtag(self, tag):
        self.inside &= tag != "blockquote"

    def handle_data(self, data):
        self.text += data if self.inside else ""


@given(prompt=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=80))
@settings(max_examples=50, deadline=None)
def test_a_page_shows_any_prompt_as_text(prompt):
    printed = nbformat.v4.new_code_cell(
        "x", outputs=[nbformat.v4.new_output("stream", text=prompt)], execution_count=1
    )
    facts = {"prompt": f"<script>{prompt}</script>", "error": None}
    page = report_page(nbformat.v4.new_notebook(cells=[printed]), facts)
    seen = _Text()
    seen.feed(page)
    assert seen.text == facts["prompt"] and "script" not in seen.elements
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


# --- real runs ---------------------------------------------------------------------------------


def test_a_run_leaves_whole_reports_and_a_failure_is_kept(reports):
    folder, done = reports
    assert done.returncode == 1, done.stderr
    assert "1 failed" in done.stdout and str(folder / "index.html") in done.stdout
    assert "failed: fails" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == [".lock"]
    for slug in ("plain", "hostile"):
        names = {path.name for path in (folder / slug).iterdir()}
        assert {"report.ipynb", "report.html", "scores.csv", "figures", "provenance.json"} <= names
        figures = {path.suffix for path in (folder / slug / "figures").iterdir()}
        assert figures == {".png", ".svg", ".json"}
    failed = nbformat.read(folder / "fails" / "report.ipynb", as_version=4)
    assert any(o.output_type == "error" for c in failed.cells for o in c.get("outputs", []))
    assert "ZeroDivisionError" in (folder / "index.html").read_text(encoding="utf-8")


def test_scores_are_tidy_and_read_back_as_they_were(reports, hostile):
    folder, _ = reports
    table = pd.read_parquet(folder / "scores.parquet")
    columns = "slug method output unit part start end label score error"
    assert list(table.columns) == columns.split()
    assert set(table["slug"]) == {"plain", "hostile"}
    mine = table[table["slug"] == "hostile"]
    one = mine[mine["method"] == "saliency"].sort_values("unit")
    assert "".join(one["label"]) == hostile and one["score"].notna().all()


def test_a_prompt_stands_once_beside_its_scores(reports, hostile):
    folder, _ = reports
    facts = json.loads((folder / "hostile" / "report.json").read_text(encoding="utf-8"))
    assert facts["prompt"] == hostile
    for table in (
        pd.read_csv(folder / "hostile" / "scores.csv"),
        pd.read_parquet(folder / "scores.parquet"),
    ):
        assert not [name for name in table if (table[name] == hostile).any()]


def test_reports_hold_no_local_path_and_no_user(reports):
    folder, _ = reports
    private = {str(Path.home()), str(ROOT), str(folder), str(folder.resolve())}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [p for p in private if p.encode() in content], path


def test_reports_hold_no_secret_of_the_environment(reports):
    folder, _ = reports
    secret = b"hf_abcdefghijklmnop"  # conftest puts it in SOME_SERVICE_TOKEN
    assert not [p for p in folder.rglob("*") if p.is_file() and secret in p.read_bytes()]


def test_a_secret_that_a_notebook_prints_is_struck_out(
    tmp_path, quick_notebook, tiny_folder, monkeypatch
):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "hf_abcdefghijklmnop")
    notebook = quick_notebook(
        "import os, pathlib; print(os.environ['SOME_SERVICE_TOKEN'], pathlib.Path.home())",
        "raise ValueError(os.environ['SOME_SERVICE_TOKEN'])",
    )
    (job,) = plan(prompts_file(tmp_path, "- Hi"), model=str(tiny_folder), notebook=str(notebook))
    facts = run_report(job, tmp_path / "out", str(tiny_folder))
    assert facts["error"] == "ValueError: …"
    for name in ("report.html", "report.ipynb", "report.json"):
        written = (tmp_path / "out" / "hi" / name).read_text(encoding="utf-8")
        assert "hf_abcdefghijklmnop" not in written and str(Path.home()) not in written, name


def test_provenance_names_what_the_numbers_depend_on(reports):
    folder, _ = reports
    facts = json.loads((folder / "plain" / "provenance.json").read_text(encoding="utf-8"))
    for key in ("model", "weights_sha256", "torch", "transformers", "captum", "dtype", "device"):
        assert facts[key], key
    assert {"attention_implementation", "seed", "target_ids"} <= set(facts)
    assert re.fullmatch(r"[0-9a-f]{64}", facts["weights_sha256"])


def test_bundled_model_reports_on_a_prompt_no_notebook_contains(tmp_path):
    prompt = "The opposite of hot is"
    source = find_notebook("report")
    assert prompt not in source.read_text(encoding="utf-8")
    notebook = papermill.execute_notebook(
        str(source),
        str(tmp_path / "out.ipynb"),
        parameters={"prompt": prompt, "output_dir": ".", "methods": ["saliency", "attention"]},
        kernel_name="python3",
        cwd=str(tmp_path),
        progress_bar=False,
    )
    table = pd.read_csv(tmp_path / "scores.csv", keep_default_na=False)
    first = table[table["method"] == "saliency"]
    assert "".join(first["label"]) == prompt and set(table["method"]) == {"saliency", "attention"}
    assert any(
        "image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])
    )


def test_a_word_of_any_length_makes_a_report_of_a_usual_size(long_word, tmp_path):
    *parts, word = long_word
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    entry = {"id": "long", "prompt": f"The {word} is", "target": "a", "units": "tokens"}
    facts = one_report(tmp_path, entry, tmp_path / "model")
    assert facts["error"] is None
    folder = tmp_path / "out" / "long"
    scores = pd.read_csv(folder / "scores.csv")
    assert scores["label"].str.len().max() < 2100 and len(scores) == 7 * scores["unit"].nunique()
    assert max(Image.open(folder / "figures" / "methods.png").size) < 2500
    write_index(tmp_path / "out")
    compare_runs(tmp_path / "out", tmp_path / "out")
    # a page has the prompt once, in the folded cell that says what was asked
    for page, often in (("long/report.html", 1), ("index.html", 0), ("compared.html", 0)):
        text = (tmp_path / "out" / page).read_text(encoding="utf-8")
        assert text.count("x" * 3000) <= often * (100_000 // 3000), page


CHAT = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "Which keys?"},
]


def one_report(folder, entry, model, **options):
    """The facts of the only report of ``entry`` in ``folder / "out"``."""
    (job,) = plan(prompts_file(folder, yaml.safe_dump([entry])), model=str(model), **options)
    return run_report(job, folder / "out", str(model))


def test_messages_are_shown_as_people_read_them(tmp_path, quick_notebook, tiny_folder):
    entry = {"messages": CHAT, "target": "abc", "units": "words"}
    facts = one_report(tmp_path, entry, tiny_folder, notebook=quick_notebook())
    assert facts["error"] is None and facts["slug"] == "which-keys"
    index = write_index(tmp_path / "out").read_text(encoding="utf-8")
    page = (tmp_path / "out" / "which-keys" / "report.html").read_text(encoding="utf-8")
    for text in (index, page):
        assert "system: Be &lt;b&gt;brief&lt;/b&gt;.\nuser: Which keys?" in text
    table = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    assert set(table["part"]) == {"template", "system", "user", "answer"}
    assert (table["end"] > table["start"]).all() and "keys" in "".join(table["label"])


@pytest.mark.parametrize(
    "more",
    [
        {"answer": 3},
        {"target": "ab", "foil": "cde", "units": "turns"},
        {"sources": ["Which"]},
        {"options": ["abc", "bcd", "cde"]},
    ],
)
def test_the_default_notebook_answers_what_an_entry_asks(tmp_path, tiny_folder, more):
    entry = {"id": "one", "messages": CHAT, "evidence": "keys", "methods": ["relevance", "random"]}
    facts = one_report(tmp_path, entry | more, tiny_folder)
    assert facts["error"] is None
    ((report,), unreadable) = read_reports(tmp_path / "out")
    assert unreadable == 0 and report.evidence["evidence_rank"].null_count == 0
    scores = report.scores.to_pandas()
    assert set(scores["method"]) == {"relevance", "random"}
    assert ("answer" in set(scores["part"])) == ("answer" in more)
    total = scores[scores["output"].isna()]
    assert len(total) == 2 * scores["unit"].nunique()
    of_each = scores[scores["output"].notna()]
    assert of_each.empty == ("sources" in more)  # whose target is one token
    if not of_each.empty:
        own = total[total["method"] == "relevance"].set_index("unit")["score"]
        sums = of_each.groupby("unit")["score"].sum()
        assert sums.to_numpy() == pytest.approx(own.to_numpy(), abs=1e-4)


@pytest.mark.thorough
def test_a_report_on_options_has_the_probability_of_each(tmp_path, bundled):
    cities = [" Tallinn", " Riga", " Vilnius", " Minsk"]
    entry = {"id": "one", "prompt": "The capital city of Latvia is", "options": cities}
    (job,) = plan(prompts_file(tmp_path, yaml.safe_dump([entry])))
    facts = run_report(job, tmp_path / "out")
    assert facts["error"] is None
    assert facts["heading"] == "Why “Riga” rather than “Tallinn”, the next of 4 options?"
    model, tokenizer = bundled
    ids = tokenizer(entry["prompt"], return_tensors="pt")["input_ids"]
    for fact, city in zip(facts["options"], cities, strict=True):
        told = 1.0
        rest = tokenizer(city)["input_ids"]
        with torch.no_grad():
            whole = torch.cat([ids, torch.tensor([rest])], dim=1)
            rows = model(whole).logits[0].double().softmax(dim=-1)
        for at, token in enumerate(rest):
            told *= rows[ids.shape[1] - 1 + at, token].item()
        assert fact["option"] == city and fact["probability"] == pytest.approx(told, rel=1e-3)
    for column in [
        [fact["share"] for fact in facts["options"]],
        *zip(*(fact["without"] for fact in facts["options"]), strict=True),
    ]:
        assert sum(column) == pytest.approx(1)
    assert facts["probability"] == pytest.approx(facts["options"][1]["probability"], rel=1e-4)
    page = (tmp_path / "out" / "one" / "report.html").read_text(encoding="utf-8")
    head, *rows = option_rows(page)
    assert head[2:] == ["share", "without 1", "without 2", "without 3", "without all"]
    assert rows[0][0] == "“Riga”"
    shares = sorted((fact["share"] for fact in facts["options"]), reverse=True)
    assert [row[2] for row in rows] == [percent(share) for share in shares]


# --- the command line --------------------------------------------------------------------------


def test_help_names_every_option(command):
    shown = command("--help").stdout
    options = "--out --model --notebook --method --dtype --workers --scheduler --threads"
    options += " --timeout --only --retry-failed --replace"
    for option in ["PROMPTS", *options.split(), "--scores-only", "--dry-run"]:
        assert option in shown


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["none.yml"], "There is no prompts file"),
        (["{good}", "--model", "./no-such-folder"], "There is no model folder"),
        (["{good}", "--method", "magic"], "There is no method"),
        (["{good}", "--dtype", "int3"], "'int3' is not one of"),
        (["{good}", "--notebook", "../secret"], "There is no notebook"),
        (["{good}", "--workers", "2", "--scheduler", "tcp://x:1"], "give one"),
    ],
)
def test_bad_input_is_one_message_without_a_traceback(command, tmp_path, arguments, complaint):
    good = prompts_file(tmp_path, "- Hello")
    done = command(*[a.format(good=good) for a in arguments], "--out", tmp_path / "out")
    assert done.exit_code == 2 and complaint in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['papermill'] = None; from llama_reports.command import main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'llama-notebooks[reports]'" in done.stderr


def test_a_worker_imports_no_torch_for_reports():
    heavy = "{'torch', 'transformers', 'pandas', 'matplotlib'}"
    code = "import sys; from llama_reports import cluster, run; run.report_task; "
    code += f"print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_out_that_cannot_be_written_is_one_message(command, tmp_path):
    good = prompts_file(tmp_path, "- Hello")
    done = command(good, "--out", good / "below-a-file")
    assert done.exit_code == 2 and "below-a-file" in done.stderr


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "index.html"
    write_whole(path, b"old")
    with pytest.raises(TypeError):
        write_whole(path, "text is not bytes")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["index.html"]


def test_the_index_says_which_attributions_did_not_close(reports, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reports[0] / "plain", out / "plain")
    evidence = out / "plain" / "evidence.csv"
    table = pd.read_csv(evidence, keep_default_na=False)
    row = table["method"] == "integrated_gradients"
    assert set(table.loc[row, "closed"]) <= {"yes", "NO"}
    asked = table["method"].isin(["integrated_gradients", "shapley"])
    assert set(table.loc[~asked, "closed"]) == {"-"}
    for closed, shown in (("yes", ">closed"), ("NO", "not&nbsp;closed")):
        table.loc[row, "closed"] = closed
        table.to_csv(evidence, index=False)
        page = write_index(out).read_text(encoding="utf-8")
        assert (shown in page) and (("not&nbsp;closed" in page) == (closed == "NO"))


def test_the_index_shows_what_was_tested_and_the_place_of_the_evidence(reports, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(reports[0] / "plain", out / "plain")
    evidence = out / "plain" / "evidence.csv"
    table = pd.read_csv(evidence, keep_default_na=False)
    assert table["beats_random"].astype(float).between(0, 1).all()
    table["evidence_rank"] = range(3, 3 + len(table))
    table.to_csv(evidence, index=False)
    page = write_index(out).read_text(encoding="utf-8")
    assert "% of random orders" in page.replace("&nbsp;", " ") and "at place 3" in page


def test_evidence_that_is_not_in_the_prompt_is_refused(tmp_path, tiny_folder):
    path = tmp_path / "prompts.yml"
    path.write_text("- {prompt: The keys to, evidence: cabinet}", encoding="utf-8")
    with pytest.raises(InputError, match="'cabinet' is not a whole word"):
        plan(path, model=str(tiny_folder))
