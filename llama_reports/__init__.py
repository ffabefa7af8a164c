"""One report a prompt: a notebook of this collection, run by papermill over a list of prompts.

``python -m llama_reports notebooks/prompts.yml`` executes ``report`` for every entry and
writes, for each, a folder with the executed notebook, a page that opens without a network, the
scores and the figures; and over all of them ``index.html`` and ``scores.parquet``.
"""

DEFAULT_NOTEBOOK = "report"
TIMEOUT = 3600.0  # seconds that a report may take
