"""What half precision and quantisation do to logits and to each method's scores.

Loads a model in float32 and once more in every other precision, asks all of them the same questions
and keeps how far logits, scores and orders move: a tidy table that notebooks/14_precision reads,
helpers/data/precision.csv, and a summary in results.md. The prompts are reporting ones, on which
nothing was tuned. Every finished prompt is kept in outputs/precision as it is made, and is not made
again by the next run: delete that folder to start over.

    python benchmarks/precision.py                       the bundled model, five minutes
    python benchmarks/precision.py --model model.gguf    another one; what is kept of others stays
"""

import hashlib
import logging
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import METHODS, InputError, attribute, load_model
from helpers.faithfulness import rank_correlation
from helpers.machine import SlowPrecision
from helpers.model_folders import public_name
from helpers.models import BUNDLED, resolve_model

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from prompt_sets import questions
from report import digest_of, keep, table

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "outputs" / "precision"
TABLE = ROOT / "helpers" / "data" / "precision.csv"
PRECISIONS = ("bfloat16", "float16", "8 bits", "4 bits")
BITS = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
TOKENS = range(5, 11)  # of a prompt: enough for an order to mean something, few enough to be quick
OPTIONS = {"integrated_gradients": {"max_evaluations": 33}, "shapley": {"permutations": 4}}
COLUMNS = ["model", "sha256", "prompt", "precision", "method", "measure", "value"]


def in_precision(model, precision):
    """``model``, a name or a file, with its weights in ``precision``."""
    if precision not in BITS:
        return load_model(model, dtype=precision)[0]
    from bitsandbytes.nn import Linear4bit  # here: there is none but for Linux

    loaded = AutoModelForCausalLM.from_pretrained(
        resolve_model(model),
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**BITS[precision]),
        use_safetensors=True,
    )
    loaded.requires_grad_(False).eval()
    for module in loaded.modules():
        if isinstance(module, Linear4bit):
            module.train()  # in evaluation it is packed, on some CPUs, and gives no gradient
    return loaded


def next_logits(model, question):
    """[vocab] in float32."""
    with torch.inference_mode():
        ids = question.input_ids.to(model.device)
        return model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().cpu()


def scores_of(model, question):
    """``{method: scores [units]}`` of the methods that the model supports."""
    found = {}
    for method in METHODS:
        try:
            found[method] = attribute(model, question, method, **OPTIONS.get(method, {})).scores
        except InputError as error:  # a method that does not fit, or numbers that overflow
            print(f"{method}: {error}", file=sys.stderr)
    return found


def compared(exact, other):
    """Rows ``(method, measure, value)``: how far ``(logits, scores)`` are from the exact ones."""
    (logits, scores), (moved_logits, moved_scores) = exact, other
    p, q = logits.log_softmax(dim=-1), moved_logits.log_softmax(dim=-1)
    rows = [
        ("", "logit", (moved_logits - logits).abs().max()),
        ("", "divergence", (p.exp() * (p - q)).sum()),
        ("", "same answer", logits.argmax() == moved_logits.argmax()),
        ("", "tie", (moved_logits == moved_logits.max()).sum() > 1),
    ]
    for method, before in scores.items():
        if method in moved_scores:
            after, size = moved_scores[method], before.abs().max().clamp_min(1e-12)
            rows += [
                (method, "moved", (after - before).abs().max() / size),
                (method, "rank correlation", rank_correlation(before, after)),
                (method, "same first", before.argmax() == after.argmax()),
            ]
    return [(method, measure, float(value)) for method, measure, value in rows]


def measure(name, prompts):
    """The rows of one model: a DataFrame with ``COLUMNS``."""
    model, tokenizer = load_model(name)
    about = {"model": public_name(name), "sha256": digest_of(name)}
    some = (q for q in questions(model, tokenizer, "reporting") if len(q.labels) in TOKENS)
    asked = list(islice(some, prompts))
    exact = [(next_logits(model, question), scores_of(model, question)) for question in asked]
    del model
    found = []
    for precision in PRECISIONS:
        parts = [KEPT / f"{_key(about, precision, question)}.csv" for question in asked]
        if not all(part.exists() for part in parts):
            model = in_precision(name, precision)
        for number, (question, part) in enumerate(zip(asked, parts, strict=True)):
            if not part.exists():
                other = next_logits(model, question), scores_of(model, question)
                rows = [
                    {**about, "prompt": number, "precision": precision, "method": method}
                    | {"measure": what, "value": value}
                    for method, what, value in compared(exact[number], other)
                ]
                part.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows, columns=COLUMNS).to_csv(part, index=False)
                print(precision, question.prompt, file=sys.stderr)
            found.append(_read(part))
    return pd.concat(found, ignore_index=True)


def _read(path):
    """A table; what is of no method has an empty text there."""
    return pd.read_csv(path).fillna({"method": ""})


def _key(about, precision, question):
    text = f"{about['sha256']} {precision} {question.prompt} {question.target} {question.foil}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summary(found):
    """The section of results.md: one table a model."""
    text = [
        "Beside float32. Each figure is a median over prompts, or a share of them; `moved` is the "
        "largest change of a score, as a share of the method's largest. Integrated gradients with "
        f"{OPTIONS['integrated_gradients']['max_evaluations']} evaluations, Shapley values with "
        f"{OPTIONS['shapley']['permutations']} orders. 8 bits are LLM.int8, 4 bits NF4, both by "
        "bitsandbytes. An empty cell: the method refuses the model.",
    ]
    for (model, digest), some in found.groupby(["model", "sha256"], sort=False):
        tokens = f"{TOKENS.start} to {TOKENS.stop - 1} tokens"
        text.append(
            f"### {model}\n\n{some['prompt'].nunique()} prompts of {tokens}; SHA-256 {digest}."
        )
        text.append(table([_logit_row(some, precision) for precision in PRECISIONS]))
        rows = [_method_row(some, method) for method in METHODS if (some["method"] == method).any()]
        text.append(table(rows))
    return "\n\n".join(text)


def _values(some, precision, what, method=""):
    rows = (some["precision"] == precision) & (some["method"] == method) & (some["measure"] == what)
    return some[rows]["value"].astype(float)


def _logit_row(some, precision):
    def of(what):
        return _values(some, precision, what)

    return {
        "precision": precision,
        "largest difference of a logit": f"{of('logit').median():.2g}",
        "KL divergence, nats": f"{of('divergence').median():.1e}",
        "same most likely token": f"{of('same answer').mean():.0%}",
        "exact tie for it": f"{of('tie').mean():.0%}",
    }


def _method_row(some, method):
    row = {"method": method}
    for precision in PRECISIONS:
        moved, ranks = (
            _values(some, precision, what, method) for what in ("moved", "rank correlation")
        )
        told = f"{ranks.median():.2f} · {moved.median():.1%}" if len(moved) else ""
        row[f"{precision}: rank correlation · moved"] = told
    return row


def main(
    model: Annotated[
        list[str] | None, typer.Option(help="Hub name, folder or .gguf (repeatable).")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts a model.")] = 6,
    out: Annotated[Path, typer.Option(help="The tidy table.")] = TABLE,
) -> None:
    """Measure each model beside float32; what the table holds of other models stays in it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line for each matrix otherwise
    warnings.simplefilter("ignore", SlowPrecision)  # this benchmark takes the time it takes
    found = pd.concat([measure(name, prompts) for name in model or [BUNDLED]])
    if out.exists():
        before = _read(out)
        found = pd.concat([before[~before["sha256"].isin(found["sha256"])], found])
    found.to_csv(out, index=False, float_format="%.4g")
    if out == TABLE:
        keep("precision", "What a precision does to logits and scores", summary(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
