"""One report: a notebook executed for one prompt, and the folder that it leaves."""

import json
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

from helpers.models import BUNDLED, public_name
from helpers.reports.files import move_into_place
from helpers.reports.jobs import NOTEBOOKS, literal

TEMPLATES = Path(__file__).resolve().parent / "templates"


def run_report(job, out, model=BUNDLED):
    """Execute one job and move its finished folder to ``out/<slug>``; returns the folder's facts.

    A notebook that fails leaves the same folder, with the notebook up to its error and the error
    in ``report.json``; nothing is raised for it. The folder is made elsewhere and moved when
    whole, so a reader never finds half of one.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as work:
        work = Path(work)
        error = None
        try:
            report = _without_lessons(job.notebook, work / "report.ipynb")
            papermill.execute_notebook(
                literal(report),
                literal(report),
                parameters=job.parameters,
                kernel_name="python3",
                cwd=str(work),
                progress_bar=False,
                # only a real error is worth a line between the progress bar's
                extra_arguments=["--log-level=ERROR"],
            )
        except papermill.PapermillExecutionError as failure:
            error = f"{failure.ename}: {failure.evalue}"
        except DeadKernelError:
            error = "The kernel died, most often for lack of memory: try a shorter prompt."
        facts = {
            "slug": job.slug,
            "prompt": job.prompt,
            "notebook": job.notebook.stem,
            "model": public_name(model),
            "error": error and error[:2000],
            "seconds": round(time.perf_counter() - started, 2),
        }
        _finish(work, facts)
        move_into_place(work, out / job.slug)
    return facts


def _without_lessons(notebook, copy):
    """Write ``notebook`` to ``copy`` without its exercises, which a report need not run or show."""
    nodes = nbformat.read(notebook, as_version=4)
    lessons = {"not-in-report", "solution"}
    nodes.cells = [c for c in nodes.cells if not lessons & set(c.metadata.get("tags", []))]
    nbformat.write(nodes, copy)
    return copy


def _finish(work, facts):
    """Complete a report's folder: figures in their own, no local paths, the page, the facts."""
    figures = work / "figures"
    figures.mkdir()
    for file in [*work.glob("*.png"), *work.glob("*.svg")]:
        file.rename(figures / file.name)
    notebook = nbformat.read(work / "report.ipynb", as_version=4)
    _forget_local_paths(notebook, work, facts)
    nbformat.write(notebook, work / "report.ipynb")
    (work / "report.html").write_text(_page(notebook, facts), encoding="utf-8")
    (work / "report.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def _forget_local_paths(notebook, work, facts):
    """Keep the home folder, and so the user's name, out of what may be passed on."""
    about = notebook.metadata.get("papermill", {})
    about.update(input_path=f"{facts['notebook']}.ipynb", output_path="report.ipynb")
    about.pop("environment_variables", None)
    hidden = {str(work): ".", str(NOTEBOOKS.parent): "…", sys.prefix: "…", str(Path.home()): "~"}

    def clean(value):
        if isinstance(value, str):
            for path, shown in hidden.items():
                value = value.replace(path, shown)
        elif isinstance(value, list):
            value = [clean(item) for item in value]
        elif isinstance(value, dict):
            value = {key: clean(item) for key, item in value.items()}
        return value

    about["parameters"] = clean(dict(about.get("parameters", {})))
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = clean(cell.source)
        for output in cell.get("outputs", []):
            output.update(clean(dict(output)))


def _page(notebook, facts):
    """The notebook as one HTML page: no script, nothing fetched, the code folded away."""
    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_anchor_links=True,
    )  # what an output may hold as HTML is harmless here: the template's policy lets no script run
    defaults = TagRemovePreprocessor(remove_cell_tags={"parameters"})  # injected ones are shown
    exporter.register_preprocessor(defaults, enabled=True)
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    page, _ = exporter.from_notebook_node(notebook, {"report": {**facts, "style": style}})
    return page
