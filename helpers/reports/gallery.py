"""The pages over all reports of a folder, and their scores in one table."""

import json
from pathlib import Path

import jinja2
import pandas as pd

from helpers.reports.files import write_whole

TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_index(out):
    """Write ``index.html`` and ``scores.parquet`` over every report folder in ``out``."""
    out = Path(out)
    reports, scores = [], []
    for file in sorted(out.glob("*/report.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        folder = file.parent
        figures = {figure.name for figure in folder.glob("figures/*.png")}
        preferred = [f for f in ("matrix_signed.png", *sorted(figures)) if f in figures]
        reports.append(
            {
                **facts,
                **_read_json(folder / "provenance.json", ("target", "foil")),
                "evidence": _read_evidence(folder / "evidence.csv"),
                "figure": preferred[0] if preferred else None,
            }
        )
        if (folder / "scores.csv").exists():
            table = _read_table(folder / "scores.csv")
            scores.append(table.assign(slug=facts["slug"]))
    if scores:
        write_whole(out / "scores.parquet", pd.concat(scores, ignore_index=True).to_parquet())
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    templates.filters["repr"] = repr  # a token in quotes, so that a space or line break is seen
    page = templates.get_template("index.html.j2").render(
        reports=sorted(reports, key=lambda report: (report["error"] is None, report["slug"])),
        failed=sum(report["error"] is not None for report in reports),
        scores=bool(scores),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
    )
    write_whole(out / "index.html", page.encode("utf-8"))
    return out / "index.html"


def _read_table(path):
    """A CSV as it was written: a token that reads ``NA`` is text, not a missing number."""
    numbers = ("gap", "sum of scores", "beats_random", "evidence_rank")
    return pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in numbers})


def _read_evidence(path):
    if not path.exists():
        return []
    rows = _read_table(path).to_dict("records")
    return [
        {
            "method": row["method"],
            "token": str(row["strongest token"]),
            "gap": _number(row["gap"]),
            "closed": row["closed"],
            "beats_random": _number(row.get("beats_random")),
            "rank": _number(row.get("evidence_rank")),
            "seconds": _number(row.get("seconds")),
        }
        for row in rows
        if row["method"] != "random"
    ]


def _number(value):
    return None if pd.isna(value) else float(value)


def _read_json(path, keys):
    if not path.exists():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    return {key: known.get(key) for key in keys}
