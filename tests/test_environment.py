"""pyproject.toml, requirements.lock, environment.yml and the imports say the same thing."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement):
    return requirement.name.lower().replace("_", "-")


def locked():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {name_of(pin): str(pin.specifier) for pin in pins}, len(pins)


def test_the_lock_pins_every_package_once_and_exactly():
    pins, count = locked()
    assert len(pins) == count > 50
    assert all(pin.startswith("==") and "*" not in pin and "+" not in pin for pin in pins.values())


def test_the_lock_satisfies_every_range_of_pyproject():
    pins, _ = locked()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *chain(*EXTRAS.values())]):
        if requirement.name == PROJECT["name"]:  # an extra that takes in another
            assert requirement.extras <= set(EXTRAS)
            continue
        version = pins[name_of(requirement)].removeprefix("==")
        assert requirement.specifier.contains(version), requirement


def test_environment_yml_repeats_the_lock_pin_by_pin():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip" and python.startswith("python=")
    assert PROJECT["requires-python"] == ">=" + python.removeprefix("python=")
    repeated = {name_of(pin): str(pin.specifier) for pin in map(Requirement, by_pip["pip"])}
    assert repeated == locked()[0]


def test_make_lock_installs_every_extra():
    rule = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.search(r'quiet "\.\[(.+)\]"', rule)[1].split(",")) == set(EXTRAS)


def drawn_in(lines):
    """What these requirements draw in, and what that does; torch's are a matter of its build."""
    found, todo = set(), [Requirement(line) for line in lines]
    while todo:
        asked = todo.pop()
        name = name_of(asked)
        if (name, *sorted(asked.extras)) in found:
            continue
        found.add((name, *sorted(asked.extras)))
        try:
            more = [] if name == "torch" else map(Requirement, requires(asked.name) or [])
        except PackageNotFoundError:  # not for this platform
            continue
        extras = [{"extra": extra} for extra in ("", *asked.extras)]
        todo += [one for one in more if not one.marker or any(map(one.marker.evaluate, extras))]
    return {name for name, *_ in found}


def test_what_make_report_installs_is_pinned_and_none_of_it_is_for_tests_or_the_lab():
    needed = drawn_in([*PROJECT["dependencies"], *EXTRAS["reports"]])
    assert len(needed) > 50 and needed <= set(locked()[0])
    beside = {name_of(Requirement(line)) for line in (*EXTRAS["lab"], *EXTRAS["test"])}
    assert needed & beside == {"jsonschema", "packaging", "pillow"}  # which others draw in


# --- what is imported is asked for -------------------------------------------------------------

# where a package is not called as its module is, or comes with one that is asked for
COMES_FROM = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "slugify": "python-slugify",
    "huggingface_hub": "huggingface-hub",
    "IPython": "ipykernel",
    "matplotlib_inline": "ipykernel",
    "jupyter_client": "nbclient",
    "dask": "distributed",
}


def imported(folder):
    """Every module that is imported anywhere in ``folder``, by its first name."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "package, others, extras", [("helpers", set(), []), ("llama_reports", {"helpers"}, ["reports"])]
)
def test_a_package_imports_what_its_dependencies_bring(package, others, extras):
    wanted = [*PROJECT["dependencies"], *chain(*(EXTRAS[extra] for extra in extras))]
    brought = {name_of(Requirement(line)) for line in wanted}
    outside = imported(package) - {package} - others
    assert {COMES_FROM.get(module, module) for module in outside} <= brought
