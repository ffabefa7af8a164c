"""The notebooks as files: their shape, their functions, and what they must not contain."""

import ast
import base64
import importlib
import inspect
import io
import pkgutil
import re
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from PIL import Image

import helpers

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem not in ("00_start", "report")]
TAGS = {
    "first-screen",
    "parameters",
    "solution",
    "nbval-ignore-output",
    "numbers-vary",
    "not-in-report",
}

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def outputs(path):
    return [output for cell in code_cells(path) for output in cell.outputs]


def tags(cell):
    return set(cell.metadata.get("tags", []))


@every_notebook
def test_was_run_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_stores_no_error_and_nothing_on_stderr(path):
    assert not [o for o in outputs(path) if o.output_type == "error" or o.get("name") == "stderr"]


@every_notebook
def test_has_one_parameters_cell_that_papermill_can_read(path):
    assert sum("parameters" in tags(cell) for cell in code_cells(path)) == 1
    parameters = papermill.inspect_notebook(str(path))
    assert {"prompt", "model_name", "dtype", "output_dir"} <= set(parameters)
    assert all(about["help"] for about in parameters.values())


@every_notebook
def test_uses_known_tags_only(path):
    used = set().union(*(tags(cell) for cell in read(path).cells))
    assert not {tag for tag in used - TAGS if not tag.startswith("guide-")}


@every_notebook
def test_names_its_kernel_and_language(path):
    about = read(path).metadata
    assert about.kernelspec.name == "python3" and about.language_info.name == "python"


@every_lesson
def test_opens_and_closes_in_the_house_style(path):
    cells = read(path).cells
    code = next(place for place, cell in enumerate(cells) if cell.cell_type == "code")
    opening = "\n".join(cell.source for cell in cells[:code])
    assert opening.startswith("# ")
    for part in ("**What you will do.**", "**What you will learn.**", "**What you need.**"):
        assert part in opening
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for heading in ("Check", "In practice", "Summary", "On your own", "Further reading"):
        assert re.search(rf"^## {heading}", text, re.MULTILINE), heading
    assert 2 <= sum("solution" in tags(cell) for cell in cells) <= 6
    assert "minutes" in text.partition("## On your own")[2]


@every_notebook
def test_every_figure_decodes_and_has_alternative_text(path):
    pictures = [o for o in outputs(path) if "image/png" in o.get("data", {})]
    assert pictures
    for output in pictures:
        picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
        assert min(picture.size) > 40 and len(picture.convert("L").getcolors(1 << 24)) > 10
        assert len(output.metadata["image/png"]["alt"]) > 20


@every_notebook
def test_names_no_local_path(path):
    text = path.read_text(encoding="utf-8")
    private = [re.escape(f"{folder}/") for folder in (Path.home(), ROOT)]
    assert not re.search("|".join([*private, r"/(home|Users|tmp)/\w"]), text)


@every_notebook
def test_keeps_cells_short(path):
    lengths = sorted(len(cell.source.splitlines()) for cell in code_cells(path))
    assert lengths[len(lengths) // 2] <= 12 and lengths[-1] <= 40


def test_the_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in readme]


# --- functions born in a notebook --------------------------------------------------------------


def born_in_notebooks():
    """``(function, notebook)`` for every helper whose docstring says where it was introduced."""
    for info in pkgutil.walk_packages(helpers.__path__, "helpers."):
        module = importlib.import_module(info.name)
        for _, function in inspect.getmembers(module, inspect.isfunction):
            found = re.search(r"Introduced in\s+notebooks/(\w+)\.ipynb", function.__doc__ or "")
            if found and function.__module__ == info.name:
                yield pytest.param(function, found[1], id=function.__name__)


def as_a_reader_sees_it(function):
    """The function as code, without its docstring and without the types of its signature."""
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        function.body = function.body[1:]
    function.returns = None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.dump(function)


@pytest.mark.parametrize("function, notebook", list(born_in_notebooks()))
def test_helper_is_the_function_its_notebook_wrote(function, notebook):
    helper = ast.parse(inspect.getsource(function)).body[0]
    source = "\n".join(c.source for c in code_cells(ROOT / "notebooks" / f"{notebook}.ipynb"))
    written = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == function.__name__
    ]
    assert len(written) == 1, f"{notebook} must define {function.__name__} once"
    assert as_a_reader_sees_it(written[0]) == as_a_reader_sees_it(helper)


# --- the guide ---------------------------------------------------------------------------------

TABLE = Path(__file__).with_name("guide_coverage.yml")
GUIDE = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
ITEMS = [pytest.param(item, id=item["tag"]) for section in GUIDE for item in section["items"]]


@pytest.mark.parametrize("item", ITEMS)
def test_guide_item_is_shown_in_an_executed_cell(item):
    cells = code_cells(ROOT / "notebooks" / f"{item['notebook']}.ipynb")
    shown = [cell for cell in cells if item["tag"] in tags(cell)]
    assert shown and all(cell.execution_count for cell in shown)


def test_every_guide_tag_is_in_the_table():
    used = {tag for path in NOTEBOOKS for cell in read(path).cells for tag in tags(cell)}
    known = {item.values[0]["tag"] for item in ITEMS}
    assert not {tag for tag in used if tag.startswith("guide-")} - known
