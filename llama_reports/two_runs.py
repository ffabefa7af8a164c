"""Two folders of reports side by side: what another model, or another prompt of that id, changed.

Reports are joined by their folder's name, the id. Whatever a folder holds is untrusted text.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from helpers.coloured import percent
from helpers.errors import InputError
from helpers.faithfulness import rank_correlation
from helpers.prompts import shortened
from helpers.tables import NOT_WRITTEN
from llama_reports.files import write_whole
from llama_reports.gallery import Report, read_reports
from llama_reports.pages import overview_page

MOVED = 3  # units that are named
STILL = 0.05  # of all a prompt's scores: a share that moved by less is not named


@dataclass(frozen=True)
class Pair:
    """One id in both folders.

    ``method`` is the one that both reports are compared by, empty where none ran in both.
    ``agreement`` is the rank correlation of its scores, ``None`` where the units are not the same
    words. ``moved`` are ``(label, share before, share after)`` of the units whose share of all
    scores changed most, in per cent.
    """

    first: Report
    second: Report
    method: str = ""
    agreement: float | None = None
    moved: tuple[tuple[str, float, float], ...] = ()

    @property
    def both(self) -> tuple[Report, Report]:
        return self.first, self.second

    def top(self, report: Report) -> list[str]:
        """The strongest units of a report by ``method``."""
        units = report.scores_of(self.method)
        written = [i for i, part in enumerate(units["part"]) if part not in NOT_WRITTEN]
        order = sorted(written, key=lambda i: -_number(units["score"][i]))
        return [shortened(units["label"][i]) for i in order[:MOVED]]


def compare_runs(first: str | Path, second: str | Path, page: str | Path | None = None) -> Path:
    """Write a page about the reports of two folders, by id; returns its path.

    ``page`` is ``compared.html`` in the first folder by default. Prompts that differ most come
    first. Raises ``InputError`` for a folder without reports, and for two that share no id.
    """
    folders = [Path(first), Path(second)]
    found = []
    for folder in folders:
        reports, _ = read_reports(folder)
        if not reports:
            raise InputError(f"There are no reports in {folder}: give the --out of a run.")
        found.append({report.slug: report for report in reports})
    shared = [slug for slug in found[0] if slug in found[1]]
    if not shared:
        raise InputError(
            f"{folders[0]} and {folders[1]} share no id: give the entries of both files the same "
            "ids, and run them again."
        )
    page = Path(page) if page is not None else folders[0] / "compared.html"
    pairs = [compare_reports(found[0][slug], found[1][slug]) for slug in shared]
    pairs.sort(key=lambda pair: -2.0 if pair.agreement is None else pair.agreement)

    def link(report):
        path = os.path.relpath(report.folder / "report.html", page.parent)
        return quote(Path(path).as_posix(), safe="/")

    write_whole(
        page,
        overview_page(
            "compared.html.j2",
            pairs=pairs,
            names=[str(folder.name or folder) for folder in folders],
            only=[[slug for slug in one if slug not in shared] for one in found],
            link=link,
            percent=percent,
        ),
    )
    return page


def compare_reports(first: Report, second: Report) -> Pair:
    """What changed from one report to the other, by a method that both ran."""
    method = _shared_method(first, second)
    if not method:
        return Pair(first, second)
    one, other = first.scores_of(method), second.scores_of(method)
    written = [
        [i for i, part in enumerate(units["part"]) if part not in NOT_WRITTEN]
        for units in (one, other)
    ]
    labels = [
        [units["label"][i] for i in some] for units, some in zip((one, other), written, strict=True)
    ]
    if labels[0] != labels[1]:
        return Pair(first, second, method)
    scores = [
        np.array([_number(units["score"][i]) for i in some])
        for units, some in zip((one, other), written, strict=True)
    ]
    shares = [100 * each / max(np.abs(each).sum(), 1e-12) for each in scores]
    change = np.abs(shares[1] - shares[0])
    order = [i for i in np.argsort(-change, kind="stable")[:MOVED] if change[i] > 100 * STILL]
    agreement = rank_correlation(*scores)
    return Pair(
        first,
        second,
        method,
        None if np.isnan(agreement) else agreement,
        tuple((shortened(labels[0][i]), float(shares[0][i]), float(shares[1][i])) for i in order),
    )


def _shared_method(first, second):
    """The one that the first report trusts, if the second ran it, or what the second trusts."""
    for report, other in ((first, second), (second, first)):
        method = report.told("method")
        if report.scores_of(method)["label"] and other.scores_of(method)["label"]:
            return method
    return ""


def _number(score):
    return float(np.nan_to_num(score))
