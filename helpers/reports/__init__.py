"""One report a prompt: a notebook of this collection, run by papermill over a list of prompts.

``python -m helpers.reports notebooks/prompts.yml`` executes ``08_comparison`` for every entry and
writes, for each, a folder with the executed notebook, a page that opens without a network, the
scores and the figures; and over all of them ``index.html`` and ``scores.parquet``.
"""

from helpers.reports.gallery import write_index
from helpers.reports.jobs import NOTEBOOKS, find_notebook, plan
from helpers.reports.prompts import read_entries
from helpers.reports.run import run_report

__all__ = ["NOTEBOOKS", "find_notebook", "plan", "read_entries", "run_report", "write_index"]
