"""One report a prompt: a notebook of this collection, run by papermill over a list of prompts.

``python -m llama_reports notebooks/prompts.yml`` executes ``08_comparison`` for every entry and
writes, for each, a folder with the executed notebook, a page that opens without a network, the
scores and the figures; and over all of them ``index.html`` and ``scores.parquet``.
"""

from llama_reports.gallery import write_index
from llama_reports.jobs import NOTEBOOKS, find_notebook, plan
from llama_reports.prompts import read_entries
from llama_reports.run import run_report

__all__ = ["NOTEBOOKS", "find_notebook", "plan", "read_entries", "run_report", "write_index"]
