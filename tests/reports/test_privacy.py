"""Nothing private in any file of a report: no local path, no secret, in whatever encoding."""

import html
import json
import re
import shutil
from urllib.parse import quote

import nbformat
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from llama_reports.jobs import plan
from llama_reports.privacy import Private, private, secrets
from llama_reports.run import run_report
from llama_reports.scores import score_part

AWKWARD = "pässw\"ord'</b>&\\ +/%=1"  # what every encoding writes in its own way
KEY = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq\nhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----"
NAMED = {
    "GITHUB_PAT": "ghp_0123456789abcdef",
    "MYSQL_PWD": "hunter2hunter2",
    "DEPLOY_PRIVATE_KEY": KEY,
    "PASSPHRASE": "correct horse battery staple",
    "DB_PASS": "p-a-s-s-1",
    "dbPassword": "camel-case-1",
    "OPENAI_KEY": "sk-0123456789",
    "SENTRY_DSN": "https://0123456789@sentry.example/1",
    "SLACK_WEBHOOK": "https://hooks.example/T0/B0/xyz",
    "NPM_CONFIG__AUTH": "dXNlcjpwYXNz",
}
INSIDE = {  # the variable, and what in it is secret
    "DATABASE_URL": ("postgresql://app:s3cr%3Dt-pass@db.example:5432/app", "s3cr=t-pass"),
    "PIP_INDEX_URL": ("https://x-0123456789@pypi.example/simple", "x-0123456789"),
    "CELERY_BROKER": ("redis://:only-a-password@redis.example/0", "only-a-password"),
    "STORAGE": ("Account=me;AccountKey=0123456789abc==;Suffix=example", "0123456789abc=="),
    "HEADER": ("Authorization: Bearer 0123456789xyz", "0123456789xyz"),
    "SERVICE_ACCOUNT": (json.dumps({"type": "x", "private_key": KEY}), "MIIEvQIBADANBgkq"),
}
ORDINARY = {
    "PWD": "/somewhere/long",
    "OLDPWD": "/somewhere/else",
    "GIT_AUTHOR_NAME": "Somebody Known",
    "TOKENIZERS_PARALLELISM": "falsefalse",
    "COMPASS": "north-north-west",
    "PATHS_OF_PATIENCE": "everything",
    "XAUTHORITY": "/somewhere/.Xauthority",
    "KEYBOARD": "qwertzuiop",
}


def test_names_of_secrets_as_people_name_them_are_known_and_others_are_not(monkeypatch):
    for name, value in (NAMED | ORDINARY | {n: v for n, (v, _) in INSIDE.items()}).items():
        monkeypatch.setenv(name, value)
    found = secrets()
    assert set(NAMED.values()) <= found
    assert {secret for _, secret in INSIDE.values()} <= found
    assert not set(ORDINARY.values()) & found


@pytest.mark.parametrize("secret", ["plain-0123456789", AWKWARD, KEY])
@pytest.mark.parametrize(
    "encode",
    [
        str,
        repr,
        json.dumps,
        html.escape,
        quote,
        lambda text: json.dumps(json.dumps({text: [text]})),
        lambda text: html.escape(repr({text: 1})),
        lambda text: repr(text.encode()),
        lambda text: pd.DataFrame({"a": [text]}).to_csv(),
        lambda text: pd.DataFrame({text: [1]}).to_html(),
        lambda text: pd.DataFrame({"a": [f"{text} {'x' * 60}"]}).to_html(),
        lambda text: text.replace("\n", "\n  "),
    ],
)
def test_a_secret_is_struck_out_in_every_encoding(secret, encode):
    parts = [part for part in secret.split("\n") if not part.startswith("---")]
    hidden = Private({}, [secret, *parts])
    told = hidden.without({f"a {encode(secret)} b": [encode(secret)]})
    shown = str(told)
    for piece in re.findall(r"\w{6,}", " ".join(parts)):
        assert piece not in shown, shown
    assert "…" in shown


def test_a_secret_that_a_table_cuts_short_is_struck_out():
    secret = "eyJ" + "0123456789abcdefABCDEF" * 4
    shown = Private({}, [secret]).without(pd.DataFrame({"a": [secret]}).to_html())
    assert "0123456789" not in shown and "abcdef" not in shown


def test_a_path_is_replaced_as_the_beginning_of_a_whole_path_only():
    hidden = Private({"/home/alice": "~", "/": "~", "/or": "~", "/data": "~"})
    same = "1/2 of an and/or gate, /home/alice2, /backup/home/alice/x, square/data, a /data.x"
    assert hidden.without(same) == same
    for before, after in [
        ("/home/alice", "~"),
        ("see /home/alice.", "see ~."),
        ("'/home/alice/x.py'", "'~/x.py'"),
        ("file:///home/alice/x", "file://~/x"),
        ("\x1b[32m/home/alice/x\x1b[0m", "\x1b[32m~/x\x1b[0m"),
        (json.dumps("a\n/data/x"), json.dumps("a\n~/x")),
        ("-I/home/alice/include", "-I~/include"),
        ("q=%2Fhome%2Falice%2Fx", "q=~%2Fx"),
    ]:
        assert hidden.without(before) == after


def test_home_at_the_root_leaves_a_prompt_as_it_is(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    text = "1/2 of an and/or gate"
    assert private(None).without(text) == text


LEAKS = """
import html, json, os, sys
import pandas as pd
from IPython.display import HTML, display
secrets = [os.environ[name] for name in ("GITHUB_PAT", "AWKWARD_PASSPHRASE", "DEPLOY_PRIVATE_KEY")]
for secret in secrets + [os.environ["DATABASE_URL"], model_name, os.getcwd()]:
    print(secret, repr(secret), json.dumps({secret: secret}), file=sys.stderr)
    print(*secret.split(), sep="\\n  ")
    display(HTML(f"<p>{html.escape(secret)}</p>"), {secret: secret})
    display(pd.DataFrame({secret: [secret]}))
    table["label"] = secret
    table.to_csv(Path(output_dir) / "scores.csv", index=False)
    frame = pd.DataFrame({"a": [1], "text": [secret], secret: [2.5]})
    frame.to_parquet(Path(output_dir) / f"{len(secret)}.parquet")
    frame.to_json(Path(output_dir) / f"{len(secret)}.json")
    frame.to_pickle(Path(output_dir) / f"{len(secret)}.pickle", compression=None)
    Path(output_dir, f"{len(secret)}.svg").write_text(f"<svg>{html.escape(secret)}</svg>")
Path(output_dir, secrets[0]).write_text("a name")
Path(output_dir, "link").symlink_to(model_name)
raise ValueError(secrets)
"""


def test_no_file_of_a_report_holds_what_is_private(
    tmp_path, quick_notebook, tiny_folder, monkeypatch
):
    given = {"GITHUB_PAT": NAMED["GITHUB_PAT"], "AWKWARD_PASSPHRASE": AWKWARD}
    given |= {"DEPLOY_PRIVATE_KEY": KEY, "DATABASE_URL": INSIDE["DATABASE_URL"][0]}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    models = tmp_path / "customer-acme" / "llama"
    shutil.copytree(tiny_folder, models)
    prompts = tmp_path / "prompts.yml"
    prompts.write_text(yaml.safe_dump([{"id": "one", "prompt": "The keys to 1/2 and/or"}]))
    (job,) = plan(prompts, model=str(models), notebook=str(quick_notebook(LEAKS)))
    facts = run_report(job, tmp_path / "out", str(models))
    assert facts["error"].startswith("ValueError: ['…', '…', '…'")
    folder = tmp_path / "out" / "one"
    pieces = ["customer-acme", "0123456789abcdef", "pässw", "p\\u00e4ssw", "s3cr"]
    pieces += ["MIIEvQIBADANBgkq", "hkiG9w0BAQEFAASC", str(tmp_path)]
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".ipynb", ".html", ".json", ".csv", ".svg", ".parquet"} <= kinds
    assert not [path for path in folder.rglob("*") if path.is_symlink() or "ghp_" in path.name]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content = str(pq.read_table(path).to_pylist()).encode()
                content += str(pq.read_schema(path).metadata).encode()
            for piece in pieces:
                assert piece.encode() not in content, (path.name, piece)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The keys to 1/2 and/or" in page
    executed = nbformat.read(folder / "report.ipynb", as_version=4)
    assert executed.metadata.papermill.parameters.model_name == "llama"
    assert any('model_name = "llama"' in cell.source for cell in executed.cells)


def test_an_error_in_the_tables_of_scores_shows_no_secret(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("GITHUB_PAT", NAMED["GITHUB_PAT"])
    prompts = tmp_path / "prompts.yml"
    secret = {"prompt": "The doors to", "target": NAMED["GITHUB_PAT"]}
    prompts.write_text(yaml.safe_dump(["The keys to", secret]))
    jobs = list(plan(prompts, model=str(tiny_folder), folders=False))
    jobs[1].parameters["foil"] = secret["target"]  # refused, and the refusal quotes it
    score_part(jobs, tmp_path / "out", model=str(tiny_folder), methods=["saliency"])
    table = pd.read_parquet(tmp_path / "out" / "prompts")
    (error,) = table["error"].dropna()
    assert "foil" in error and "ghp_" not in error
