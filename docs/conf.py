"""The book: Sphinx over the committed notebooks, docs/ and the docstrings. Nothing is executed.

The source folder is the root of the repository, so that a link from a notebook to the README, or
from docs/ to a notebook, is the same link on a code host and in the book.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the docstrings are those of this folder

project = "Llama models, notebook by notebook"
html_title = project
html_short_title = "Llama notebooks"
language = "en"
root_doc = "docs/index"
include_patterns = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results.md"),
    *("docs/**", "notebooks/*.ipynb"),
]
exclude_patterns = [".*", "build", "outputs", "tests", "**/.ipynb_checkpoints"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4  # as code hosts name them

autosummary_generate = False  # tables of what is there; the pages are written by hand
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # of torch and papermill
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
default_role = "code"

html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}
html_copy_source = True
html_sourcelink_suffix = ""  # a copied notebook keeps its name: it is what the page offers
html_show_sourcelink = False
html_show_copyright = False
html_domain_indices = False
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = ["book.js"]
html_additional_pages = {"index": "start.html"}
html_math_renderer = "mathml"
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


# Reports that were made before are living examples; without them their page says how to make them.
REPORTS = ROOT / "outputs" / "reports"
if (REPORTS / "index.html").is_file():
    tags.add("reports")  # noqa: F821, Sphinx puts it there

# a docstring's table of fields, and a bar: an absolute value
FIELD = re.compile(r"(``\S.*?``(?:, ``.*?``)*) {2,}(\S.*)")
BAR = re.compile(r"(``.*?``)|\|")
PARAMETERS = re.compile(r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>")
BADGE = re.compile(r"^\[!\[.*badge\.svg.*\n", re.MULTILINE)  # a code host draws them
NO_HEADING = re.compile(r"<th([^>]*)>(?:\s|<p>\s*</p>)*</th>")


def setup(app):
    app.connect("autodoc-process-docstring", _as_restructured_text)
    app.connect("html-page-context", _mend_markup, priority=900)  # after the theme
    app.connect("build-finished", _copy_reports)
    app.connect("source-read", _read_notebook)
    app.connect("doctree-read", _number_and_describe, priority=100)  # before titles are collected
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_formula, None))


def _as_restructured_text(app, what, name, about, options, lines):
    """Docstrings are plain prose: a table of fields becomes a list of definitions."""
    told, within = [], False
    for line in lines:
        line = BAR.sub(lambda found: found[1] or r"\|", line)
        field = FIELD.fullmatch(line)
        within = bool(field) or (within and line.startswith(" "))
        if field:
            told += [field[1], "   " + field[2]]
        else:
            told.append("   " + line.strip() if within else line)
    lines[:] = told


def _mend_markup(app, pagename, template, context, doctree):
    """What screen readers stumble over: headings without level or text, lists that are none."""
    for part in {"body", "furo_navigation_tree"} & context.keys():
        named = context[part].replace('role="heading"', 'role="heading" aria-level="2"')
        named = NO_HEADING.sub(r"<td\1></td>", named)
        context[part] = PARAMETERS.sub(_as_lines, named)


def _as_lines(found):
    lines = found[1].replace("<dd>", "<span>").replace("</dd>", "</span>")
    return f'<span class="parameters">{lines}</span>'


def _copy_reports(app, error):
    if error is None and app.tags.has("reports"):
        hidden = shutil.ignore_patterns(".*", "plan.parquet", "log.jsonl")
        shutil.copytree(REPORTS, app.outdir / "reports", ignore=hidden, dirs_exist_ok=True)


def _read_notebook(app, docname, source):
    """Solutions and folded code open when they are asked for; pictures keep what describes them."""
    if not docname.startswith("notebooks/"):
        source[0] = BADGE.sub("", source[0])
        return
    notebook, described = json.loads(source[0]), {}
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        solution = "solution" in tags
        if solution or cell["metadata"].get("jupyter", {}).get("source_hidden"):
            what = "a solution" if solution else "the code"
            cell["metadata"]["tags"] = [*tags, "hide-cell" if solution else "hide-input"]
            cell["metadata"]["mystnb"] = {
                "code_prompt_show": f"Show {what}",
                "code_prompt_hide": f"Hide {what.replace('a ', 'the ')}",
            }
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                picture = base64.b64decode("".join(output["data"]["image/png"]))
                digest = hashlib.sha256(picture).hexdigest()  # myst-nb's name for the file
                described[digest] = output["metadata"].get("image/png", {}).get("alt")
    app.env.current_document["described"] = described
    source[0] = json.dumps(notebook)


def _number_and_describe(app, doctree):
    """Lessons are called by their numbers, so titles have them; myst-nb drops alternative texts."""
    number, _, name = Path(app.env.docname).name.partition("_")
    if number.isdigit() and name:
        title = next(doctree.findall(nodes.title))
        title.insert(0, nodes.Text(f"{number} "))
    described = app.env.current_document.get("described", {})
    for image in doctree.findall(nodes.image):
        alt = image.get("alt") or described.get(Path(image["uri"]).stem)
        if alt:
            image["alt"] = alt
        else:
            told = "A picture has no alternative text: show_figure takes one."
            logging.getLogger(__name__).warning(told, location=image)


def _inline_formula(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _formula(translator, node):
    """A formula on lines of its own, as MathML, which browsers draw by themselves."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode
