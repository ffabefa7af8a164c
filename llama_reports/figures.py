"""Every figure of the notebooks made again, with a manifest that says from what.

``python -m llama_reports.figures [NOTEBOOK ...]`` runs the notebooks and writes their figures as
SVG and PNG into ``outputs/figures``, and beside them ``manifest.json``: of each figure its
notebook, cell and parameters, the numbers that it plots, their digest, and the versions of what
made it. That of the repository's figures is ``docs/figures.json``; ``--accept`` writes it anew.
"""

import argparse
import hashlib
import json
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import papermill

from helpers import PACKAGES
from helpers.errors import InputError
from llama_reports.files import read_mapping, write_whole

ROOT = Path(__file__).resolve().parents[1]
ACCEPTED = ROOT / "docs" / "figures.json"
RELATIVE, ABSOLUTE = 0.02, 0.005  # of a number, and of the largest number of its kind in the figure
VARIES = {
    "numbers-vary",
    "nbval-ignore-output",
}  # tags of cells whose numbers depend on the machine


def digest(data: Any) -> str:
    """SHA-256 of what a figure plots, as ``plotted_data`` gives it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(found: list[dict], accepted: list[dict]) -> list[str]:
    """What two lists of a manifest's figures disagree about, a sentence each; none if they agree.

    Numbers may differ by 2 % or by 0.5 % of the largest beside them: processors add up in different
    orders. Of cells whose numbers vary from machine to machine, only what is drawn is compared.
    """
    told = []
    before = {(figure["notebook"], figure["name"]): figure for figure in accepted}
    after = {(figure["notebook"], figure["name"]): figure for figure in found}
    for key in sorted(before.keys() | after.keys()):
        name = f"{key[0]}, figure {key[1]}"
        if key not in before or key not in after:
            told.append(f"{name}: {'new' if key in after else 'no longer drawn'}")
            continue
        old, new = before[key], after[key]
        if new["sha256"] == old["sha256"] or new["varies"]:
            continue
        told += [f"{name}: {where}" for where in _apart(new["data"], old["data"])]
    return told


def _apart(new, old):
    if len(new) != len(old):
        return [f"{len(new)} axes instead of {len(old)}"]
    for place, (ours, theirs) in enumerate(zip(new, old, strict=True)):
        for kind in sorted(ours.keys() | theirs.keys()):
            a, b = ours.get(kind, []), theirs.get(kind, [])
            if len(a) != len(b):
                return [f"axes {place}: {len(a)} {kind} instead of {len(b)}"]
            worst = _farthest(a, b)
            if worst:
                return [f"axes {place}, {kind}: {worst[0]:g} instead of {worst[1]:g}"]
    return []


def _farthest(a, b):
    """The first pair of numbers that are not the same within the tolerances."""
    size = max((abs(y) for y in b if y is not None and math.isfinite(y)), default=0)
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            if x is not y:
                return (math.nan if x is None else x, math.nan if y is None else y)
        elif abs(x - y) > RELATIVE * abs(y) + ABSOLUTE * size:
            return x, y
    return None


def make(notebook: Path, folder: Path) -> list[dict[str, Any]]:
    """Runs a notebook, writes its figures into ``folder`` and returns their part of the manifest.

    Raises papermill's ``PapermillExecutionError`` if a cell fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.*"):  # of an earlier run
        left.unlink()
    ran = papermill.execute_notebook(
        str(notebook),
        None,
        parameters={"output_dir": str(folder.resolve())},
        cwd=str(notebook.parent),
        engine_name="warm",  # as reports are made
        progress_bar=False,
    )
    defaults = papermill.inspect_notebook(str(notebook))
    parameters = {
        name: about["default"] for name, about in defaults.items() if name != "output_dir"
    }
    cells = [
        cell for cell in ran.cells if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    figures = []
    for number, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            about = output.get("metadata", {}).get("image/png", {})
            if "name" in about:
                data = json.loads((folder / f"{about['name']}.json").read_text(encoding="utf-8"))
                figures.append(
                    {
                        "notebook": notebook.stem,
                        "cell": number,
                        "name": about["name"],
                        "parameters": parameters,
                        "varies": bool(VARIES & set(cell.metadata.get("tags", []))),
                        "sha256": digest(data),
                        "data": data,
                    }
                )
    return figures


def versions() -> dict[str, str]:
    """What the figures were made with."""
    names = [*PACKAGES, "matplotlib", "seaborn"]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def manifest_text(figures: list[dict[str, Any]]) -> str:
    """The manifest as JSON, one figure a line."""
    lines = ",\n".join(json.dumps(figure, ensure_ascii=False) for figure in figures)
    return f'{{"versions": {json.dumps(versions())},\n"figures": [\n{lines}\n]}}\n'


def main() -> None:
    """The command: makes the figures, and says where they differ from the accepted ones."""
    about = argparse.ArgumentParser(
        prog="python -m llama_reports.figures", description="All figures."
    )
    about.add_argument("notebooks", nargs="*", help="names such as 04_embeddings; none means all")
    about.add_argument("--out", type=Path, default=ROOT / "outputs" / "figures")
    about.add_argument("--accept", action="store_true", help=f"write {ACCEPTED.name} anew")
    asked = about.parse_args()
    try:
        chosen = _named(asked.notebooks)
    except InputError as error:
        sys.exit(str(error))
    names = {notebook.stem for notebook in chosen}
    accepted = list(read_mapping(ACCEPTED).get("figures", []))
    others = [figure for figure in accepted if figure["notebook"] not in names]
    found: list[dict[str, Any]] = []
    for notebook in chosen:
        made = make(notebook, asked.out / notebook.stem)
        print(f"{notebook.stem}: {len(made)} figures", flush=True)
        found += made  # and kept at once: the next notebook may fail
        write_whole(asked.out / "manifest.json", manifest_text(found).encode())
    if asked.accept:
        kept = sorted([*others, *found], key=lambda figure: (figure["notebook"], figure["cell"]))
        write_whole(ACCEPTED, manifest_text(kept).encode())
    told = differences(found, [figure for figure in accepted if figure["notebook"] in names])
    print("\n".join(told) or "The same numbers as in docs/figures.json.")
    print(f"Figures and manifest.json are in {asked.out}")
    if told and not asked.accept:
        sys.exit(1)


def _named(names):
    every = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    unknown = [name for name in names if name not in every]
    if unknown:
        raise InputError(f"There is no notebook {unknown[0]!r}: choose from {', '.join(every)}.")
    return [every[name] for name in names] or list(every.values())


if __name__ == "__main__":
    main()
