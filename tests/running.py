"""What tests of whole runs share: a notebook to run, and the scores that a run leaves."""

import nbformat
import pandas as pd


def write_notebook(path, parameters, *cells):
    """A notebook file of these code cells, the first of which holds its parameters."""
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": spec})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *cells)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def scores(out):
    """``scores.parquet`` in an order that does not depend on that of the run."""
    table = pd.read_parquet(out / "scores.parquet")
    return table.sort_values(["slug", "method", "output", "unit"], ignore_index=True)
