"""What a code host reads: that it parses, and that its versions are those of the lock."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["ruff", "codespell"])
def test_pre_commit_lints_with_the_locked_versions(name):
    (repo,) = (r for r in read_yaml(".pre-commit-config.yaml")["repos"] if name in r["repo"])
    assert repo["rev"] == "v" + re.search(rf"^{name}==(.+)$", LOCK, re.MULTILINE)[1]


def test_the_citation_is_of_this_version_and_licence():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(ROOT) for p in (ROOT / ".github").rglob("*.yml"))
)
def test_files_for_the_code_host_parse_and_run_what_there_is(path):
    found = read_yaml(path)
    if "jobs" not in found:
        assert found["name"] and all(field["type"] for field in found["body"])
        return
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for job in found["jobs"].values():
        ran = [step["run"] for step in job["steps"] if "run" in step]
        assert ran and {line.split()[1] for line in ran if line.startswith("make ")} <= rules


def test_the_container_sets_up_by_a_rule_of_the_makefile():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    rule = container["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{rule}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def test_the_tests_run_on_every_system_and_version_that_is_promised():
    jobs = read_yaml(".github/workflows/tests.yml")["jobs"]
    rows = jobs["elsewhere"]["strategy"]["matrix"]["include"]
    assert {row["os"].split("-")[0] for row in rows} == {"ubuntu", "macos", "windows"}
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert {oldest, "3.13"} <= {row["python"] for row in rows}
    (bound,) = (need for need in PROJECT["dependencies"] if need.startswith("transformers"))
    lowest = re.search(r">=([\d.]+)", bound)[1]
    pins = [step.get("run", "") for step in jobs["elsewhere"]["steps"]]
    assert any(f"transformers=={lowest}" in pin for pin in pins)


def test_the_badges_are_of_workflows_that_there_are_and_of_this_project():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    badges = re.findall(r"actions/workflows/([\w.]+)/badge\.svg", readme)
    assert badges and all((ROOT / ".github" / "workflows" / name).exists() for name in badges)
