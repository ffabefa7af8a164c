"""What a browser is shown: pages under a strict policy, any text as text."""

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bleach
import jinja2
import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import TagRemovePreprocessor
from papermill.execute import ERROR_MARKER_TAG

from helpers.coloured import stylesheet
from helpers.prompts import SHOWN, shortened

if TYPE_CHECKING:
    from helpers.summary import Summary  # which would import torch

TEMPLATES = Path(__file__).resolve().parent / "templates"
EXCERPT = 600  # characters of a prompt, so that what is said of it stands on the same screen
FIRST = "first-screen"  # the tag of the cell whose output opens a report's page

# HTML drops or alters these characters: each is shown as the picture of itself (U+2400 ...) or, the
# half of a pair that no file can hold, as U+FFFD.
_UNSHOWABLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_UNSHOWABLE |= {0x7F: 0x2421} | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)

# What Markdown and tables of a notebook need, and nothing that loads, moves or styles a page.
_TAGS = {
    *("a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div"),
    *(
        "dl",
        "dt",
        "em",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "hr",
        "i",
        "img",
        "kbd",
        "li",
        "mark",
        "ol",
    ),
    *("p", "pre", "s", "span", "strong", "sub", "summary", "sup"),
    *("table", "tbody", "td", "th", "thead", "tr", "ul"),
}
_SILENT = re.compile(r"<(script|style|title)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)  # not prose


def shown(text: str) -> str:
    """``text`` with the control characters that HTML cannot carry made visible; nothing else."""
    return text.translate(_UNSHOWABLE)


def content_policy(*, style: str, images: str, script: str | None = None) -> str:
    """A Content-Security-Policy that allows one style, at most one script, both by their SHA-256.

    ``style`` and ``script`` are the exact texts between the tags, ``images`` the sources of
    pictures. Nothing else loads, runs, or is sent. Source: W3C, Content Security Policy Level 3.
    """
    rules = ["default-src 'none'", f"style-src '{_digest(style)}'", f"img-src {images}"]
    if script is not None:
        rules.append(f"script-src '{_digest(script)}'")
    return "; ".join([*rules, "base-uri 'none'", "form-action 'none'"])


def _digest(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def overview_page(name: str, **values: Any) -> bytes:
    """One of the pages over all reports, ``templates/<name>``, as bytes.

    It has the style, the policy and the script of the gallery; every value is escaped.
    """
    style, script = _style() + _text("gallery.css"), _text("gallery.js")
    policy = content_policy(style=style, images="'self' file:", script=script)
    template = _environment().get_template(name)
    page = template.render(style=style, script=script, policy=policy, **values)
    return page.encode("utf-8")


@cache
def _environment():
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
    )
    environment.filters["quoted"] = repr  # a token in quotes, so that a space or line break is seen
    return environment


def _finalize(value):
    """What an expression of a template prints; escaping comes after."""
    return "" if value is None else shown(value) if type(value) is str else value


def _style():
    return _text("style.css") + stylesheet()


@cache
def _text(name):
    return (TEMPLATES / name).read_text(encoding="utf-8")


def report_page(notebook: Any, facts: Mapping[str, Any], alone: bool = False) -> str:
    """The executed ``notebook`` as one HTML page: no script, nothing fetched, the code folded away.

    ``facts`` are those of ``report.json``; ``prompt`` and ``error`` stand at the top. HTML that a
    cell wrote or printed is reduced to prose, tables and pictures; colours of a terminal are left
    out. Where a cell is tagged ``first-screen``, its output stands before all else. A page that
    is ``alone`` has no link to others. One process builds the exporter once: pages are made one at
    a time.
    """
    style, cells = _style(), list(notebook.cells)
    if facts["error"]:
        cells = _that_ran(cells)
    first = [cell for cell in cells if FIRST in cell.metadata.get("tags", []) and cell.outputs]
    if first:  # what it needed comes last: imports, parameters, the model
        place = cells.index(first[0])
        cells = [first[0], *cells[place + 1 :], *cells[:place]]
    told = {
        "first": bool(first),
        "alone": alone,
        "prompt": shortened(shown(facts["prompt"]), EXCERPT if facts["error"] else SHOWN),
        "error": shown(facts["error"] or ""),
        "style": style,
        "policy": content_policy(style=style, images="data:"),
    }
    notebook = nbformat.from_dict({**notebook, "cells": cells})
    page, _ = _exporter().from_notebook_node(notebook, {"report": told})
    return shown(page)


def _that_ran(cells):
    """The cells of a notebook up to its error, without papermill's word on it: the page has one."""
    ran = [place for place, cell in enumerate(cells) if cell.get("execution_count") is not None]
    until = cells[: ran[-1] + 1] if ran else []
    return [cell for cell in until if ERROR_MARKER_TAG not in cell.metadata.get("tags", [])]


def summary_page(summary: "Summary") -> str:
    """The page of a summary alone, as it opens a report."""
    output = nbformat.v4.new_output("display_data", {"text/html": summary._repr_html_()})
    cell = nbformat.v4.new_code_cell(outputs=[output], metadata={"tags": [FIRST]})
    prompt = summary.question.prompt
    facts = {"prompt": prompt if isinstance(prompt, str) else summary.heading, "error": None}
    return report_page(nbformat.v4.new_notebook(cells=[cell]), facts, alone=True)


@cache
def _exporter():
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
        sanitize_html=True,  # no script could run, but a <meta> refresh could lead away
    )
    # nbconvert's own list is so short that it turns headings and pictures into text
    exporter.register_filter("clean_html", _clean)
    exporter.register_filter("ansi2html", lambda text: html.escape(strip_ansi(text)))
    defaults = TagRemovePreprocessor(remove_cell_tags={"parameters"})  # injected ones are shown
    exporter.register_preprocessor(defaults, enabled=True)
    return exporter


def _clean(markup):
    text = markup.decode() if isinstance(markup, bytes) else str(markup)
    text = _SILENT.sub("", shown(text))
    protocols = {"http", "https", "mailto", "data"}
    return bleach.clean(text, _TAGS, _allowed, protocols, strip=True)


def _allowed(tag, name, value):
    """Whether bleach may keep an attribute: pictures are in the page, links lead to pages."""
    if name == "src":
        return tag == "img" and value.startswith("data:image/")
    if name == "href":
        return tag == "a" and not value.lower().strip().startswith("data:")
    own = {"td": ("colspan", "rowspan", "scope"), "details": ("name", "open")}
    own["th"] = own["td"]
    common = ("class", "id", "title", "lang", "dir", "alt", "width", "height")
    return name in common or name in own.get(tag, ())
