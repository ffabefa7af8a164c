"""The pages over all reports of a folder, and their scores in one table.

``index.html`` lists the reports, ``comparison.html`` compares the methods over all their prompts.
Whatever a report folder holds is read as untrusted text: what cannot be read is left out.
"""

import io
import math
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from statistics import mode
from typing import Any
from urllib.parse import quote

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from markupsafe import Markup

from helpers.coloured import coloured_text, percent
from helpers.faithfulness import bootstrap_interval
from helpers.plots import readable, save_figure
from helpers.prompts import shortened
from llama_reports.files import read_mapping, write_whole
from llama_reports.pages import EXCERPT, overview_page, shown

CONTROL = "random"  # the method that knows nothing
# columns of a report's evidence.csv and scores.csv
MEASURES = ["gap", "beats_random", "evidence_rank", "faithfulness", "seconds", "evaluations"]
MEASURES += ["forwards"]
MAY_BE_EMPTY = [*MEASURES, "error", "output"]
EVIDENCE = dict.fromkeys(["method", "strongest unit", "closed"], pa.string())
EVIDENCE |= dict.fromkeys(MEASURES, pa.float64())
SCORES = {"method": pa.string(), "output": pa.int64(), "unit": pa.int64()}
SCORES |= {"part": pa.string(), "start": pa.int64(), "end": pa.int64(), "label": pa.string()}
SCORES |= {"score": pa.float64(), "error": pa.float64()}
# columns whose median the comparison shows, and what it calls them
MEDIANS = {"evidence_rank": "place", "evaluations": "gradients"}
MEDIANS |= {name: name for name in ("gap", "seconds", "forwards")}
IN_ONE_BLOCK = pyarrow.csv.ReadOptions(use_threads=False, block_size=2**26)
OVER_LINES = pyarrow.csv.ParseOptions(newlines_in_values=True)
TRUST = {"yes": "borne out", "weak": "weakly borne out", "no": "not borne out"}
FEWEST = 5  # prompts for an interval: resampling fewer says too little about others


@dataclass(frozen=True)
class Report:
    """One report folder, read. ``evidence`` and ``scores`` are None where there are none.

    ``facts`` are those of ``report.json``.
    """

    folder: Path
    prompt: str
    error: str | None
    notebook: str
    model: str
    seconds: float | None
    facts: dict
    provenance: dict
    evidence: pa.Table | None
    scores: pa.Table | None

    @property
    def slug(self) -> str:
        """The folder's name, whatever ``report.json`` says: it is what a link has to reach."""
        return self.folder.name.encode("utf-8", "replace").decode()

    @property
    def weights(self) -> tuple[str, str]:
        """``(dtype, digest)`` of the model, two empty texts where the report does not say."""
        known = self.provenance
        return (str(known.get("dtype") or ""), str(known.get("weights_sha256") or "")[:12])

    @property
    def href(self) -> str:
        return quote(os.fsencode(self.folder.name), safe="")

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The rows of the evidence, one a method; that of the control is left out."""
        rows = [] if self.evidence is None else self.evidence.to_pylist()
        return [row for row in rows if row["method"] != CONTROL]

    @property
    def state(self) -> str:
        """How far to believe it: failed, one of ``TRUST``, or done where it does not say."""
        if self.error is not None:
            return "failed"
        trust = self.facts.get("trust")
        return TRUST.get(str(trust.get("borne_out")), "done") if isinstance(trust, dict) else "done"

    @property
    def trust(self) -> str:
        """The sentences that say why."""
        trust = self.facts.get("trust")
        said = trust.get("sentences") if isinstance(trust, dict) else None
        return " ".join(map(str, said)) if isinstance(said, list) else ""

    def told(self, name: str) -> str:
        """A sentence of ``report.json``, or its beginning; empty without it."""
        return shortened(said) if isinstance(said := self.facts.get(name), str) else ""

    def share(self, name: str) -> float | None:
        """A number of ``report.json`` from 0 to 1, ``None`` without it."""
        return _share(self.facts.get(name))

    @property
    def excerpt(self) -> str:
        """The beginning of the prompt."""
        return self.prompt if len(self.prompt) <= EXCERPT else f"{self.prompt[:EXCERPT]}…"

    def scores_of(self, method: str) -> dict[str, list]:
        """Columns of ``scores.csv`` that are of ``method``, of all outputs together, by name."""
        if self.scores is None:
            return {name: [] for name in SCORES}
        own = pc.and_(pc.equal(self.scores["method"], method), pc.is_null(self.scores["output"]))
        return self.scores.filter(own).to_pydict()

    @cached_property
    def coloured(self) -> Markup | None:
        """The prompt coloured by the method that the report trusts most; None if it names none."""
        units, strongest = self.scores_of(self.told("method")), self.facts.get("strongest")
        places = range(len(units["label"]))
        if not places or not isinstance(strongest, list) or not all(i in places for i in strongest):
            return None
        scores = np.nan_to_num(np.array(units["score"], dtype=float))
        labels = [shown(label) for label in units["label"]]
        signed = bool((scores < 0).any())
        text = coloured_text(labels, scores, units["part"], strongest, signed=signed, most=EXCERPT)
        return Markup(text)  # in which all text is escaped


def write_index(out: str | Path) -> Path:
    """Write ``index.html``, ``comparison.html`` and ``scores.parquet`` over the reports in ``out``.

    Each file is whole or absent, at any moment. Folders whose ``report.json`` cannot be read are
    left out and counted on the page. Returns the path of ``index.html``.
    """
    out = Path(out)
    reports, unreadable = read_reports(out)
    scores = _together(reports, "scores")
    if scores is not None:
        file = io.BytesIO()
        pyarrow.parquet.write_table(scores, file)
        write_whole(out / "scores.parquet", file.getvalue())
    else:
        (out / "scores.parquet").unlink(missing_ok=True)
    sections = compare(reports)
    _draw_gaps(out, sections)
    counts = {"total": len(reports), "failed": sum(r.error is not None for r in reports)}
    page = overview_page("comparison.html.j2", sections=sections, median=np.median, **counts)
    write_whole(out / "comparison.html", page)
    page = overview_page(
        "index.html.j2",
        reports=sorted(reports, key=lambda report: (report.error is None, report.slug)),
        states=[*TRUST.values()] if any(r.state in TRUST.values() for r in reports) else [],
        methods=sorted({line["method"] for report in reports for line in report.lines}),
        probabilities=any(_share(r.provenance.get("probability")) is not None for r in reports),
        unreadable=unreadable,
        scores=scores is not None,
        share=_share,
        percent=percent,
        shortened=shortened,
        **counts,
    )
    write_whole(out / "index.html", page)
    return out / "index.html"


# --- reading report folders --------------------------------------------------------------------


def read_reports(out: str | Path) -> tuple[list[Report], int]:
    """The report folders in ``out``, by name, and how many have a ``report.json`` but no report.

    A folder being written has a name with a dot and is no report yet.
    """
    reports, unreadable = [], 0
    for file in sorted(Path(out).glob("[!.]*/report.json")):
        facts, folder = read_mapping(file), file.parent
        prompt, error = facts.get("prompt"), facts.get("error")
        if not isinstance(prompt, str):
            unreadable += 1
            continue
        reports.append(
            Report(
                folder=folder,
                prompt=prompt,
                error=None if error is None else str(error),
                notebook=str(facts.get("notebook") or ""),
                model=str(facts.get("model") or ""),
                seconds=_finite(facts.get("seconds")),
                facts=facts,
                provenance=read_mapping(folder / "provenance.json"),
                evidence=None if error else _read_csv(folder / "evidence.csv", EVIDENCE),
                scores=None if error else _read_csv(folder / "scores.csv", SCORES),
            )
        )
    return reports, unreadable


def _read_csv(path, columns):
    """These columns of a CSV as a table, or None if that cannot be; ``NA`` is a text.

    A column of ``MAY_BE_EMPTY`` may be missing, and a number in it may be empty: both are null, as
    is a measure that is not finite.
    """
    convert = pyarrow.csv.ConvertOptions(
        column_types=columns, include_columns=list(columns), include_missing_columns=True
    )
    try:
        table = pyarrow.csv.read_csv(path, IN_ONE_BLOCK, OVER_LINES, convert)
    except (OSError, ValueError, KeyError):  # what pyarrow raises is one of these
        return None
    for place, name in enumerate(columns):
        if name in MEASURES:
            finite = pc.if_else(pc.is_finite(table[name]), table[name], None)
            table = table.set_column(place, name, finite)
    needed = [name for name in columns if name not in MAY_BE_EMPTY]
    return None if any(table[name].null_count for name in needed) else table


def _together(reports, kind):
    """The ``"scores"`` or ``"evidence"`` of reports as one table with their slugs, None without."""
    tables = [(r.slug, getattr(r, kind)) for r in reports if getattr(r, kind) is not None]
    if not tables:
        return None
    return pa.concat_tables(t.add_column(0, "slug", pa.repeat(s, len(t))) for s, t in tables)


def _finite(value):
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _share(value):
    value = _finite(value)
    return value if value is not None and 0 <= value <= 1 else None


# --- the comparison ----------------------------------------------------------------------------


def compare(reports: list[Report]) -> list[dict]:
    """The methods side by side, one section a model: a list of dicts for the comparison page.

    Reports of different models, weights or dtypes are never averaged. Reports that ask about the
    same prompt are not independent: they count as one, with the mean of their values. ``mean`` of a
    measure is over prompts, ``low`` and ``high`` its 95 % bootstrap interval, None for fewer than
    five prompts.
    """
    models: dict[str, dict] = {}
    for report in reports:
        models.setdefault(report.model, {}).setdefault(report.weights, []).append(report)
    sections = []
    for model, groups in sorted(models.items()):
        # a report that failed says no more than the name of its model
        unknown = groups.pop(("", ""), []) if len(groups) > 1 else []
        for weights, group in sorted(groups.items()):
            sections.append(_section(model, weights if len(groups) > 1 else None, group + unknown))
            unknown = []
    return sections


def _section(model, weights, group):
    usable = [r for r in group if r.evidence is not None or r.scores is not None]
    prompts = {r.slug: shown(r.prompt) for r in usable}  # a table holds no half of a pair
    tables = {kind: _together(usable, kind) for kind in ("evidence", "scores")}
    frames = {kind: table.to_pandas() for kind, table in tables.items() if table is not None}
    for frame in frames.values():
        frame["prompt"] = frame["slug"].map(prompts)
    rows = _method_rows(frames["evidence"]) if "evidence" in frames else []
    pairs = agreement(frames["scores"]) if "scores" in frames else {}
    names = [row["method"] for row in rows]  # in this order, then those that have scores alone
    names = [*names, *sorted({name for pair in pairs for name in pair} - {*names})]
    names = [name for name in names if any(name in pair for pair in pairs)]
    return {
        "model": model,
        "detail": "{}, weights {}".format(*weights) if weights else "",
        "reports": len(usable),
        "prompts": len({*prompts.values()}),
        "failed": sum(r.error is not None for r in group),
        "without": sum(r.error is None for r in group) - len(usable),
        "methods": rows,
        "agreement": pairs,
        "rows": names[1:],
        "columns": names[:-1],  # of the lower triangle
        "usual": mode(pair["prompts"] for pair in pairs.values()) if pairs else 0,
        "gaps": _gaps(frames["evidence"]) if "evidence" in frames else {},
    }


def _mean(values, prompts):
    """Mean over prompts and its interval; ``values`` may have several a prompt, or be missing."""
    each = values.groupby(prompts).mean().dropna()
    if each.empty:
        return None
    mean, low, high = float(each.mean()), None, None
    if len(each) >= FEWEST:
        resamples = max(200, min(2000, 4_000_000 // len(each)))  # what fits in memory
        mean, low, high = bootstrap_interval(each, resamples)
    return {"mean": mean, "low": low, "high": high, "prompts": len(each)}


def _method_rows(evidence):
    """A row a method, the best-borne-out first and the control last."""
    rows = []
    for method, found in evidence.groupby("method"):
        row = {
            "method": method,
            "prompts": found["prompt"].nunique(),
            "beats": _mean(found["beats_random"], found["prompt"]),
            "faithfulness": _mean(found["faithfulness"], found["prompt"]),
            "first": int((found["evidence_rank"] == 1).sum()),
            "places": int(found["evidence_rank"].count()),
            "closed": int((found["closed"] == "yes").sum()),
            "promised": int(found["closed"].isin(["yes", "NO"]).sum()),
        }
        medians = found[list(MEDIANS)].median().rename(MEDIANS)
        rows.append(row | {name: _finite(value) for name, value in medians.items()})
    best = {row["method"]: row["beats"]["mean"] if row["beats"] else -1 for row in rows}
    return sorted(rows, key=lambda row: (row["method"] == CONTROL, -best[row["method"]]))


def agreement(scores: pd.DataFrame) -> dict[tuple[str, str], dict]:
    """How alike two methods order the units, over prompts: ``{(method, method): measure}``.

    ``scores`` is a DataFrame with the columns of ``scores.parquet`` and ``prompt``, of which the
    rows of an output by itself are left out. The measure is Spearman's correlation of the
    magnitudes of the scores within a prompt, as ``rank_correlation`` of ``helpers.faithfulness``
    has it, then its mean over prompts (see ``compare``). Prompts of fewer than three units, and
    methods that score all units alike, have none.
    """
    places = ["slug", "unit"]
    scores = scores[scores["output"].isna()].drop_duplicates([*places, "method"])
    prompts = scores.groupby("slug")["prompt"].first()
    wide = scores.pivot(index=places, columns="method", values="score").abs()
    each = wide.groupby(level="slug")
    found = {slug: block.corr("spearman", min_periods=3) for slug, block in each}
    measures = {}
    for pair in combinations(wide.columns, 2):
        values = pd.Series({slug: table.at[pair] for slug, table in found.items()}, dtype=float)
        measures[pair] = _mean(values, prompts.reindex(values.index))
    return {pair: measure for pair, measure in measures.items() if measure is not None}


def _gaps(evidence):
    """``{method: gaps [prompts]}`` of the methods that have any, the smallest median first."""
    gaps = evidence.dropna(subset=["gap"]).groupby("method")["gap"]
    found = {method: values.abs().to_numpy() for method, values in gaps}
    return dict(sorted(found.items(), key=lambda item: np.median(item[1])))


def _draw_gaps(out, sections):
    """The gaps of each section as ``_figures/gaps-N.svg`` and ``.png``.

    No report can have that folder: the name of one begins with a letter or a digit.
    """
    (out / "_figures").mkdir(exist_ok=True)
    for number, section in enumerate(sections, start=1):
        if not section["gaps"]:
            continue
        with tempfile.TemporaryDirectory() as work:
            fig, ax = plt.subplots(figsize=(8.5, 1.2 + 0.42 * len(section["gaps"])))
            gap_boxes(ax, section["gaps"])
            for path in save_figure(fig, f"gaps-{number}", work):
                write_whole(out / "_figures" / path.name, path.read_bytes())
            plt.close(fig)


def gap_boxes(ax: Any, gaps: dict[str, np.ndarray], smallest: float = 1e-4) -> Any:
    """``{method: gaps [reports]}`` as one box and a strip of points a method, on a log axis.

    Gaps below ``smallest`` are drawn there. The dashed line is the 2 % that a method has to reach
    to be called closed.
    """
    rows = [np.maximum(values, smallest) for values in gaps.values()]
    places = np.random.default_rng(0).uniform(-0.22, 0.22, max(map(len, rows)))
    for height, row in enumerate(rows):
        few = row[:: -(-len(row) // 400)]  # more points than this are a smear
        ax.scatter(few, height + places[: len(few)], s=14, color="#0b57d0", alpha=0.5, linewidth=0)
    style = {"medianprops": {"color": "#b3261e", "linewidth": 2}, "manage_ticks": False}
    style |= {"positions": range(len(rows)), "widths": 0.5, "whis": (5, 95), "showfliers": False}
    ax.boxplot(rows, orientation="horizontal", **style)
    ax.set_xscale("log")
    ax.set_yticks(range(len(gaps)), [readable(method) for method in gaps], parse_math=False)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value * 100:,.6g}\xa0%")
    ax.axvline(0.02, color="0.35", linestyle="--", linewidth=1)
    ax.set(ylim=(len(gaps) - 0.4, -0.6))
    ax.set_xlabel("gap; box: middle half, line: median, whiskers: 5–95\xa0%")
    ax.spines[["top", "right"]].set_visible(False)
    return ax
