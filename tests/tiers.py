"""Which tests are a first look, and in which order the others run.

``toy`` marks what needs neither the bundled model, nor a network, nor a process of its own: pytest
-m toy. ``thorough`` marks what ``make test-all`` alone runs. With several workers a file stays with
one of them, since its tests share what they set up; what takes longest comes first, so that at the
end none works alone.
"""

import gc
import os

import pytest
from xdist.scheduler import LoadFileScheduling

# Each of these tests sets up its own, so that any worker can take the next one.
APART = ("tests/reports/test_papermill.py",)
# These look at one run of reports, which each worker would make for itself.
ONE_RUN = tuple(f"tests/reports/test_{name}.py" for name in ("browser", "reports", "scores"))
LONGEST_FIRST = (
    *APART,
    "notebooks/",
    "tests/reports/",
    "tests/test_benchmarks.py",
    "tests/notebooks/",
    *(f"tests/helpers/test_{name}" for name in ("models", "engine", "ground_truth", "summary")),
)


class LongestFirst(LoadFileScheduling):
    def __init__(self, config, log=None):
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by the number of tests, which is not their time

    def _split_scope(self, nodeid):
        if nodeid.startswith(ONE_RUN):
            return "one run of reports"
        return nodeid if nodeid.startswith(APART) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return LongestFirst(config, log) if config.getoption("dist") == "loadfile" else None


def place(item):
    starts = (number for number, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start))
    return next(starts, len(LONGEST_FIRST))


# What makes these takes minutes: three downloads of a model, a hub, the book, a browser.
COSTLY_FIXTURES = {"fetches", "hub_answers", "built", "browser"}
TOY_FILES = (
    "answers",
    "attribution",
    "decompositions",
    "engine",
    "faithfulness",
    "find_then_rank",
    "patching",
    "path",
    "prompts",
    "relevance",
)
# One of so many cases of a parametrised test is toy: diagonals through the product of parameters.
# make mutants takes every case, and these files, too.
EVERY = int(os.environ.get("TOY_EVERY", "8"))
TOY_FILES += ("architectures", "coalitions", "many", "questions") if EVERY == 1 else ()


def pytest_ignore_collect(collection_path, config):
    """With ``-m toy`` no file is imported that has no such test."""
    asked = config.option.markexpr == "toy" and collection_path.is_file()
    return (asked and collection_path.stem.removeprefix("test_") not in TOY_FILES) or None


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect tests, not garbage: what is imported stays, and is looked through never again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before -m chooses, and before an order by chance
def pytest_collection_modifyitems(items):
    items.sort(key=place)
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.random_order(disabled=True))  # its cells are in order
        if COSTLY_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.thorough)
        if is_toy(item):
            item.add_marker(pytest.mark.toy)


def is_toy(item):
    """Mathematics on the toy model."""
    parameters = item.callspec.indices if hasattr(item, "callspec") else {}
    return (
        item.nodeid.startswith("tests/helpers/")
        and item.path.stem.removeprefix("test_") in TOY_FILES
        and "bundled" not in item.fixturenames
        and item.get_closest_marker("thorough") is None
        and sum(parameters.values()) % EVERY == 0
    )
