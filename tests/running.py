"""What tests of whole runs share: a notebook to run, patience, and what a run leaves."""

import os
import re
import subprocess
import sys
import time
from xml.etree import ElementTree

import nbformat
import pandas as pd

PATIENCE = 600  # seconds after which something hangs, on however slow a machine
EVERY_CASE = bool(os.environ.get("EVERY_CASE"))  # as once a month


def few(cases, number):
    """``number`` of these cases, evenly spread; with ``EVERY_CASE=1`` all of them."""
    return list(cases) if EVERY_CASE else list(cases)[:: max(1, len(cases) // number)][:number]


def write_notebook(path, parameters, *cells):
    """A notebook file of these code cells, the first of which holds its parameters."""
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def process(*given):
    """The command line in a process, which a cluster that it starts has to itself; finished."""
    line = [sys.executable, "-m", "llama_reports", *map(str, given)]
    return subprocess.run(line, capture_output=True, text=True)


def wait_for(seen, process):
    """Wait until ``seen()``, for which ``process`` has to be running."""
    deadline = time.monotonic() + PATIENCE
    while not seen():
        assert process.poll() is None, "it ended before what a test waits for"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.05)


def scores(out):
    """``scores.parquet`` in an order that does not depend on that of the run."""
    table = pd.read_parquet(out / "scores.parquet")
    return table.sort_values(["slug", "method", "output", "unit"], ignore_index=True)


def option_rows(page):
    """The cells of a page's table of options, as text."""
    table = re.search('<div class="options">(<table>.*?</table>)', page, flags=re.DOTALL)[1]
    rows = ElementTree.fromstring(table).iter("tr")
    return [["".join(cell.itertext()) for cell in row] for row in rows]
