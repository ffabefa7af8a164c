"""A notebook that passed, and of which nothing has changed since, need not run again.

``--skip-unchanged``, which ``make test`` gives and ``make test-all`` does not, skips its cells and
says so. What passed is kept in the cache of pytest, by a digest of all that a notebook depends on:
its cells and stored outputs, the modules that it imports and what these import (by grimp, which
reads imports and runs none), their data, what compares its outputs, the lock and the Python.
"""

import hashlib
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import grimp
import nbformat
import pytest

KEPT = "notebooks/passed"  # in pytest's cache: the digest of each notebook that passed
PACKAGES = ("helpers", "llama_reports")
ALWAYS = ("requirements.lock", "tests/notebooks/nbval_sanitize.cfg", "helpers/data/*")
COMPARES = "tests/notebooks/compare_outputs.py"
REASON = "unchanged since it passed"


def pytest_addoption(parser):
    said = "Skip the cells of notebooks that passed and have not changed since."
    parser.addoption("--skip-unchanged", action="store_true", help=said)


def code_cells(path):
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@cache
def import_graph():
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def modules(path):
    """The names of this project's modules that a notebook imports, and what they import."""
    graph, found = import_graph(), set()
    names = r"\b((?:{})(?:\.\w+)*)(?:\s+import\s+(\w+))?".format("|".join(PACKAGES))
    for name, part in re.findall(names, "\n".join(code_cells(path))):
        found |= {name, name.partition(".")[0], f"{name}.{part}"} & graph.modules
    return found.union(*map(graph.find_upstream_modules, found))


def digest(path, root):
    """SHA-256 of all that the notebook at ``path`` depends on, in the checkout at ``root``."""
    files = [Path(path), root / COMPARES]
    for pattern in ALWAYS:
        files += root.glob(pattern)
    for name in modules(path):
        place = root.joinpath(*name.split("."))
        files.append(place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
    found = hashlib.sha256(sys.version.encode())
    for file in sorted(file for file in files if file.is_file()):
        found.update(f"{file} {file.stat().st_size} ".encode() + file.read_bytes())
    return found.hexdigest()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("skip_unchanged"):
        return
    root, kept = config.rootpath, config.cache.get(KEPT, {})
    same = {
        name for name in kept if (root / name).is_file() and kept[name] == digest(root / name, root)
    }
    reasons = {root / name: f"{name}: {REASON}" for name in same}
    for item in items:
        if item.path in reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[item.path]))


def pytest_sessionstart(session):
    """One process keeps what passed: the one that hears of every test."""
    if session.config.option.nbval and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Passed(session.config))


class Passed:
    """Counts the cells that pass, and keeps the notebooks of which all did."""

    def __init__(self, config):
        self.config, self.cells, self.before = config, Counter(), {}

    def pytest_runtest_logstart(self, nodeid):
        name = nodeid.partition("::")[0]
        if name.endswith(".ipynb") and name not in self.before:  # as it is when it begins
            self.before[name] = digest(self.config.rootpath / name, self.config.rootpath)

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[0]
        if name in self.before and report.when == "call":
            self.cells[name, report.outcome] += 1

    def pytest_sessionfinish(self):
        kept = self.config.cache.get(KEPT, {})
        for name, before in self.before.items():
            if self.cells[name, "failed"]:
                kept.pop(name, None)
            elif self.cells[name, "passed"] == len(code_cells(self.config.rootpath / name)):
                kept[name] = before
        self.config.cache.set(KEPT, kept)
