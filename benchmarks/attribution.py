"""Integrated gradients and gradients by this engine and by its peers, side by side.

Every number is a whole process: it loads the model, warms up, and measures one call. Peers take
turns on the same question with the same steps, round by round, so that a ratio compares two things
run minutes apart on the same machine; the ratio that is kept is the median over the rounds.

    python benchmarks/attribution.py                 everything; writes results.md
    python benchmarks/attribution.py --lengths 6,35  some lengths, for a look; writes nothing

inseq has an environment of its own, from peers/inseq-requirements.txt: --inseq PATH/TO/python.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import ask, attribute, load_model
from helpers.attribution import asking, baseline_embeds, embed_prompt, objective, rows_per_batch
from helpers.attribution.attention import attention_rows
from helpers.attribution.engine import gradient_bytes, working_precision
from helpers.attribution.path import _points as points_of
from helpers.models import bundled_model
from helpers.prompts import Unit
from helpers.questions import Question

sys.path.insert(0, str(Path(__file__).parent))  # the benchmarks are scripts, not a package
from machine import gradient_flops, matrix_rate, measured
from peers.usual import compute_integrated_gradients, gradient_based_attribution
from prompt_sets import question_of, questions
from report import keep, table

HERE = Path(__file__).parent
# length: steps, rounds. The same work for every peer; fewer steps where one of them takes minutes.
LENGTHS = {6: (50, 3), 35: (50, 3), 151: (50, 2), 512: (10, 2), 2048: (4, 1)}


# --- the peers: each a function of a loaded model that gives scores [seq] -----------------------


def usual(model, tokenizer, question, steps):
    ids = question.input_ids
    scores, _ = compute_integrated_gradients(model, tokenizer, ids, "pad", steps)
    return scores.sum(dim=-1)[0]


def captum_layer(model, tokenizer, question, steps):
    from captum.attr import LayerIntegratedGradients

    embed = model.get_input_embeddings()
    method = LayerIntegratedGradients(lambda ids: model(ids).logits[:, -1], embed)
    ends = torch.full_like(question.input_ids, tokenizer.eos_token_id)
    scores = method.attribute(
        question.input_ids, baselines=ends, target=question.target[0], n_steps=steps
    )
    return scores.sum(dim=-1)[0].detach()


def captum_llm(model, tokenizer, question, steps):
    """Captum's class for language models. It explains the log-probability, not the logit."""
    from captum.attr import LayerIntegratedGradients, LLMGradientAttribution, TextTokenInput

    layer = LayerIntegratedGradients(model, model.get_input_embeddings())
    result = LLMGradientAttribution(layer, tokenizer).attribute(
        TextTokenInput(question.prompt, tokenizer), target=question.target_label, n_steps=steps
    )
    return result.seq_attr.detach()


def ours(model, tokenizer, question, steps, precision=None, baseline="eos"):
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    alphas, weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
    with working_precision(model, precision), asking(model, [question]) as asked:
        _, slopes = points_of(asked, 0, baseline)(alphas)  # [steps, 1, seq]
    return weights @ slopes[:, 0]


def ours_bfloat16(model, tokenizer, question, steps):
    return ours(model, tokenizer, question, steps, "bfloat16")


def usual_gradient(model, tokenizer, question, steps):
    return gradient_based_attribution(model, question.input_ids)[0]


def ours_gradient(model, tokenizer, question, steps):
    return attribute(model, question, "saliency").scores


PATHS = {
    "the usual code": usual,
    "Captum LayerIntegratedGradients": captum_layer,
    "Captum LLMGradientAttribution": captum_llm,
    "ours": ours,
    "ours, bfloat16": ours_bfloat16,
}
GRADIENTS = {"the usual gradient": usual_gradient, "our gradient": ours_gradient}
PEERS = PATHS | GRADIENTS


def work(peer, length, steps):
    """One measurement, as a process of its own: a JSON line."""
    model, tokenizer = load_model()
    question = question_of(model, tokenizer, length)
    if peer.startswith(("the usual", "Captum")):
        model.requires_grad_(True)  # as from_pretrained leaves it; our loader freezes
    run = PEERS[peer]
    gradient = peer in GRADIENTS
    run(model, tokenizer, question_of(model, tokenizer, 6), 2)  # short: what it frees stays held
    with measured() as took:
        repeats = max(1, 300 // length) if gradient else 1
        for _ in range(repeats):
            model.zero_grad(set_to_none=True)
            scores = run(model, tokenizer, question, steps)
    rate = matrix_rate()
    done = gradient_flops(model, length) * (1 if gradient else steps)
    return {
        "seconds": took.seconds / repeats,
        "bytes": took.bytes,
        "share of rate": done * repeats / took.seconds / rate,
        "rate": rate,
        "scores": scores.double().tolist(),
    }


def spawn(peer, length, steps, inseq=None):
    if peer != "inseq":
        command = [sys.executable, __file__, "--peer", peer, "--length", str(length)]
        command += ["--steps", str(steps)]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    model, tokenizer = load_model()
    question = question_of(model, tokenizer, length)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as ids:
        json.dump(question.input_ids[0].tolist(), ids)
        ids.flush()
        command = [inseq, str(HERE / "peers/inseq_peer.py"), "--model", str(bundled_model())]
        command += ["--ids-file", ids.name, "--target", str(question.target[0])]
        command += ["--steps", str(steps)]
        done = subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "bytes": found["peak_bytes"]}


# --- the tables --------------------------------------------------------------------------------


def compare(lengths, peers, base, inseq, rounds_of=lambda rounds: rounds):
    """One row a length and peer: the ratio to ``base``, the rate, the memory, the agreement."""
    rows = []
    for length in lengths:
        steps, rounds = LENGTHS[length]
        runs = {peer: [] for peer in peers}
        for _ in range(rounds_of(rounds)):
            for peer in peers:  # in turns, so that a slow minute of the machine meets all
                print(f"{length} tokens, {steps} steps: {peer}", file=sys.stderr)
                runs[peer].append(spawn(peer, length, steps, inseq))
        reference = torch.tensor(runs[base][0]["scores"])
        for peer, found in runs.items():
            ratios = [b["seconds"] / r["seconds"] for b, r in zip(runs[base], found, strict=True)]
            apart = (torch.tensor(found[0]["scores"]) - reference).abs().max()
            share = median(run.get("share of rate", float("nan")) for run in found)
            rows.append(
                {
                    "tokens": length,
                    "steps": steps,
                    "by": peer,
                    "times as fast as the usual code": f"{median(ratios):.2f}",
                    "seconds": f"{median(run['seconds'] for run in found):.2f}",
                    "of the matrix rate": "" if np.isnan(share) else f"{share:.0%}",
                    "memory above the model, MB": f"{max(r['bytes'] for r in found) / 1e6:,.0f}",
                    "largest difference from the scores of the usual code": OTHER.get(
                        peer, f"{apart / reference.abs().max():.0e}"
                    ),
                }
            )
    return rows


OTHER = {  # peers whose scores answer another question
    "Captum LLMGradientAttribution": "another objective",
    "inseq": "another baseline",
}


def agreement_of_bfloat16(split="reporting", steps=50):
    """Rank correlations of scores in bfloat16 with float32, over the short prompts, by method."""
    model, tokenizer = load_model()
    asked = [q for q in questions(model, tokenizer, split) if 4 <= len(q.labels) <= 15]

    def path(question, precision, baseline):
        return ours(model, tokenizer, question, steps, precision, baseline)

    runs = {
        f"{steps} equal steps from the end-of-text token": lambda q, p: path(q, p, "eos"),
        f"{steps} equal steps from half the prompt's embeddings, a path without cliffs": (
            lambda q, p: path(q, p, 0.5 * embed_prompt(model, q))
        ),
    }
    for name in ("saliency", "gradient_x_input", "occlusion", "attention"):
        runs[name] = lambda q, p, n=name: attribute(model, q, n, precision=p).scores
    rows = []
    for name, run in runs.items():
        found = []
        for question in asked:
            scores = {p: run(question, p).numpy() for p in (None, "bfloat16")}
            found.append(pd.DataFrame(scores).rank().corr().iloc[0, 1])
        rows.append(
            {
                "method": name,
                "prompts": len(found),
                "rank correlation, median": f"{median(found):.3f}",
                "least": f"{min(found):.3f}",
            }
        )
    return rows


def causality(lengths=(35, 151, 256)):
    """Occlusion with and without the shared beginning: the same falls, and how much sooner."""
    model, tokenizer = load_model()
    rows = []
    for length in lengths:
        question = question_of(model, tokenizer, length)
        each = torch.eye(length, dtype=torch.bool)
        taken = {"plain": [], "shared": []}
        for _ in range(1 if length > 200 else 3):
            with measured() as took:
                plain = replaced_plainly(model, question, each)
            taken["plain"].append(took.seconds)
            blank, owner = baseline_embeds(model, question), torch.zeros(length, dtype=torch.long)
            with measured() as took, asking(model, [question]) as asked:
                shared = asked.erased(owner, each, blank)[:, 0]
            taken["shared"].append(took.seconds)
        ratios = [p / s for p, s in zip(taken["plain"], taken["shared"], strict=True)]
        apart = (plain - shared).abs().max() / plain.abs().max()
        rows.append(
            {
                "tokens": length,
                "times as fast": f"{median(ratios):.2f}",
                "seconds": f"{median(taken['shared']):.2f}",
                "largest difference": f"{apart:.0e}",
            }
        )
    return rows


def replaced_plainly(model, question, replaced):
    """``erased`` as one would write it: every variant run whole, in batches."""
    embeds, blank = embed_prompt(model, question), baseline_embeds(model, question)
    values = []
    with torch.inference_mode():
        for some in replaced.split(rows_per_batch(len(replaced))):
            rows = torch.where(some[..., None], blank, embeds)
            values.append(objective(model, rows, question))
    return torch.cat(values)


def last_attention_rows(model, question):
    """The weights with which the last position reads, [layers, heads, seq]."""
    with asking(model, [question]) as asked:
        return torch.stack([layer[0, :, -1] for layer in attention_rows(asked)])


def last_rows(length=8192, compared=1024):
    """The last attention rows of a long prompt: memory, and equality with eager's full maps."""
    model, tokenizer = load_model()
    question = question_of(model, tokenizer, compared)
    rows = last_attention_rows(model, question)
    model.set_attn_implementation("eager")
    maps = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, i, out: maps.append(out[1][0, :, -1]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(question.input_ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    apart = float((rows - torch.stack(maps)).abs().max())
    ids = torch.arange(length)[None] % len(tokenizer)  # the licence is too short
    long = ask(model, tokenizer, "any", target=" the")
    with measured() as took:
        rows = last_attention_rows(model, replace(long, input_ids=ids))
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    return {
        "tokens": length,
        "memory above the model, MB": f"{took.bytes / 1e6:,.0f}",
        "full maps would take, MB": f"{layers * heads * length**2 * 4 / 1e6:,.0f}",
        "seconds": f"{took.seconds:.1f}",
        f"largest difference from eager at {compared} tokens": f"{apart:.0e}",
    }


LLAMA_3_2_1B = {  # the published shape of Llama-3.2-1B, with random weights
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}


def on_accelerator(device, shape=LLAMA_3_2_1B, lengths=(35, 151, 512, 2048), steps=50):
    """The usual code and ours on a model of this shape in bfloat16, both on ``device``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape)).to(device, torch.bfloat16).eval()
    kind = str(device).partition(":")[0]
    sizes = {"width": shape["hidden_size"], "inner": shape["intermediate_size"]}
    rate = matrix_rate(torch.bfloat16, device=device, **sizes)
    rows = []
    for length in lengths:
        ids = torch.randint(0, shape["vocab_size"], (1, length), device=device)
        labels, units = [""] * length, [Unit("", (place,), "prompt") for place in range(length)]
        question = Question("random tokens", ids, labels, ["prompt"] * length, units, (1,))
        question = replace(question, probability=0.0, objective="logit")
        tokenizer = SimpleNamespace(pad_token_id=0)
        taken = {"usual": [], "ours": []}
        for round_of in range(4):  # the first warms up
            with measured(kind) as took:
                compute_integrated_gradients(model, tokenizer, ids, "pad", steps)
            taken["usual"] += [took] if round_of else []
            with measured(kind) as took:
                ours(model, tokenizer, question, steps)
            taken["ours"] += [took] if round_of else []
        seconds = {name: median(t.seconds for t in some) for name, some in taken.items()}
        flops = gradient_flops(model, length)
        rows.append(
            {
                "tokens": length,
                "the usual code, seconds": f"{seconds['usual']:.3f}",
                "ours, seconds": f"{seconds['ours']:.3f}",
                "times as fast": f"{seconds['usual'] / seconds['ours']:.1f}",
                "of the matrix rate": f"{steps * flops / seconds['ours'] / rate:.0%}",
                "memory above the model, MB": f"{max(t.bytes for t in taken['ours']) / 1e6:,.0f}",
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", help="only these, such as 6,35; nothing is written")
    parser.add_argument("--peers", help="only these, by name, after the usual code: for a look")
    parser.add_argument("--rounds", type=int, help="of each comparison, instead of the table's own")
    parser.add_argument("--inseq", help="the python of an environment with inseq")
    for name, kind in (("--peer", str), ("--length", int), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # one measurement
    given = parser.parse_args()
    if given.peer:
        print(json.dumps(work(given.peer, given.length, given.steps)))
        return
    lengths = [int(n) for n in given.lengths.split(",")] if given.lengths else list(LENGTHS)
    paths = list(PATHS)
    if given.inseq:
        paths.append("inseq")
    if given.peers:
        paths = [paths[0], *given.peers.split(";")]
    rounds = (lambda usual: given.rounds) if given.rounds else (lambda usual: usual)
    rows = compare(lengths, paths, "the usual code", given.inseq, rounds)
    slopes = compare(lengths, list(GRADIENTS), "the usual gradient", None, rounds)
    print(table(rows), table(slopes), sep="\n\n")
    if given.lengths or given.peers:
        return
    model, _ = load_model()
    text = [
        "### Integrated gradients, the same steps and the same baseline (the end-of-text token)",
        table(rows),
        "LLMGradientAttribution explains a log-probability and inseq starts from the unknown "
        "token, so their scores are other numbers. The usual code runs rows one by one and the "
        "others in batches; where they differ by more than 1e-4, so does Captum from Captum: the "
        "path has cliffs, which multiply float32's rounding, and bfloat16's far more."
        + ("" if given.inseq else " inseq was not run: no environment was given (--inseq)."),
        f"Estimated memory of a gradient pass: {gradient_bytes(model) / 1e6:.2f} MB a token.",
        "### bfloat16 against float32, reporting prompts of 4 to 15 tokens",
        table(agreement_of_bfloat16()),
        "### One gradient",
        table(slopes),
        "### Occlusion, with the part before the first change computed once",
        table(causality()),
        "### The last attention row of every layer and head",
        table([last_rows()]),
        "### A model of Llama-3.2-1B's shape, random weights, bfloat16, on a GPU",
    ]
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        text.append("Not measured: there was no GPU.")
    else:
        name = torch.cuda.get_device_name() if device.type == "cuda" else str(device)
        text += [f"50 steps on {name}.", table(on_accelerator(device))]
    keep("attribution", "The engine and its peers", "\n\n".join(text))


if __name__ == "__main__":
    main()
