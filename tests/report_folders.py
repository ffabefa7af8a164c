"""Report folders as a run leaves them, written by a test: for what reads them."""

import csv
import json


def write_report(out, slug, prompt, methods=None, *, error=None, summary=None, **facts):
    """Make ``out/slug`` as ``report.ipynb`` and ``run_report`` do; returns the folder.

    ``methods`` maps a name to what its row of ``evidence.csv`` says beside the defaults; the key
    ``scores`` holds the scores of the units. ``summary`` is what the notebook says of itself in
    ``report.json``. ``facts`` go to ``report.json`` or, those that it has
    no place for, to ``provenance.json``.
    """
    folder = out / slug
    folder.mkdir(parents=True)
    report = {
        "slug": slug,
        "prompt": prompt,
        "notebook": facts.pop("notebook", "report"),
        "model": facts.pop("model", "SmolLM2-135M-Instruct"),
        "error": error,
        "seconds": facts.pop("seconds", 12.5),
        **(summary or {}),
    }
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (folder / "report.html").write_text("<title>a report</title>", encoding="utf-8")
    if error is not None or methods is None:
        return folder
    defaults = {"strongest unit": " is", "sum of scores": 1.5, "gap": None, "closed": "-"}
    defaults |= {"error": None, "evaluations": 1, "forwards": 2, "seconds": 0.25}
    defaults |= {"faithfulness": 1.0, "random_faithfulness": -0.5, "beats_random": 0.5}
    defaults |= {"evidence_rank": None, "verdict": ""}
    evidence, scores = [], []
    for name, said in methods.items():
        evidence.append({"method": name} | defaults | {k: said[k] for k in said if k != "scores"})
        for i, score in enumerate(said.get("scores", [0.5, -1.0, 2.0])):
            row = {"method": name, "output": None, "unit": i, "part": "prompt"}
            row |= {"start": i, "end": i + 1, "label": f" {i}"}
            scores.append(row | {"score": float(score), "error": None})
    _write_table(folder / "evidence.csv", evidence)
    _write_table(folder / "scores.csv", scores)
    known = {"target": " Rig", "foil": None, "tokens": 3, "dtype": "float32"} | facts
    (folder / "provenance.json").write_text(json.dumps(known), encoding="utf-8")
    return folder


def _write_table(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
