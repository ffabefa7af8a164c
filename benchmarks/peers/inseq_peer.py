"""Integrated gradients of one next token by inseq, to compare this project's with.

Run it with the python of an environment of its own, made from inseq-requirements.txt; it imports
nothing from this repository:

    python inseq_peer.py --model FOLDER --ids-file ids.json --target 17 --steps 50

It explains the logit of ``--target`` after exactly the token ids of the file and prints one line
of JSON: the seconds and the peak memory of the call, the scores [seq] (summed over the hidden
dimension, so signed), the baseline and the versions.

inseq's ``model.attribute`` takes text. A text need not encode to the same ids again, and a target
may merge with the end of the prompt, so the batch is made from ids here and handed to the
``attribute`` of inseq's method, which ``model.attribute`` calls after it has encoded its text.
Everything else is inseq's default: eager attention, and weights that require gradients.

Baselines:

``default``  inseq's own: the embedding of the unknown token at each position, or of the padding
             token where the tokenizer has no unknown one. Positions that hold the end-of-text
             token keep it, so they score exactly 0.
``mean``     the average of all token embeddings at each position.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: the model is a folder

import inseq
import torch
from inseq.data import BatchEncoding, DecoderOnlyBatch, get_batch_from_inputs

TOKENS_PER_PASS = 2048  # rows times tokens that go through the model at once


def load(folder):
    """inseq's wrapper around the model of a local folder, in float32 on the CPU."""
    only_local = {"local_files_only": True, "trust_remote_code": False}
    return inseq.load_model(
        folder,
        "integrated_gradients",
        device="cpu",  # inseq would take a GPU where there is one
        model_kwargs={**only_local, "use_safetensors": True, "dtype": torch.float32},
        tokenizer_kwargs=only_local,
    )


def make_batch(peer, ids, target, baseline):
    """What inseq makes of a text, made from ids: the prompt and, after it, the forced target.

    Returns the batch and a description of its baseline.
    """
    input_ids = torch.tensor([[*ids, target]])
    unknown, eos = peer.tokenizer.unk_token_id, peer.eos_token_id
    encoding = BatchEncoding(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        input_tokens=peer.convert_ids_to_tokens(input_ids, skip_special_tokens=False),
        baseline_ids=torch.where(input_ids == eos, eos, unknown),  # as in inseq's encode()
    )
    batch = DecoderOnlyBatch.from_batch(get_batch_from_inputs(peer, encoding))
    if baseline == "mean":
        mean = peer.vocabulary_embeddings.detach().mean(dim=0)
        batch.baseline_embeds = mean.expand_as(batch.input_embeds)
        return batch, "mean of all token embeddings"
    return batch, f"embedding of token {unknown}; positions of token {eos} keep it"


def attribute(peer, batch, steps):
    """inseq's scores [seq] of the logit of the batch's last token, for the tokens before it."""
    seq = batch.input_ids.shape[1] - 1
    output = peer.attribution_method.attribute(
        batch,
        attributed_fn=peer.get_attributed_fn("logit"),
        attr_pos_start=seq,
        attr_pos_end=seq + 1,
        show_progress=False,
        pretty_progress=False,
        output_step_attributions=True,
        attribution_args={
            "n_steps": steps,
            "internal_batch_size": max(1, TOKENS_PER_PASS // seq),
        },
    )
    # The step's scores, not the sequence's: from those inseq drops the positions of padding
    # tokens, which are the end-of-text tokens of a chat prompt.
    return output.step_attributions[0].target_attributions[0].sum(dim=-1)


def memory(field):
    """A field of /proc/self/status, in bytes: VmRSS, or VmHWM for its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a Llama in safetensors")
    parser.add_argument("--ids-file", required=True, help="JSON list of the prompt's token ids")
    parser.add_argument("--target", type=int, required=True, help="id of the token to explain")
    parser.add_argument("--steps", type=int, required=True, help="points of the path")
    parser.add_argument("--baseline", choices=["default", "mean"], default="default")
    args = parser.parse_args()
    ids = json.loads(Path(args.ids_file).read_text(encoding="utf-8"))

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the one line of JSON
        peer = load(args.model)
        batch, baseline = make_batch(peer, ids, args.target, args.baseline)
        attribute(peer, batch.clone(), steps=1)  # warm-up

        # Not getrusage's ru_maxrss: it cannot be set back, so it would count the loading of the
        # model, and a child process starts with its parent's.
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = memory("VmRSS")
        began = time.perf_counter()
        scores = attribute(peer, batch, args.steps)
        seconds = time.perf_counter() - began
        peak = max(0, memory("VmHWM") - before)

    result = {
        "seconds": seconds,
        "peak_bytes": peak,
        "scores": scores.tolist(),
        "baseline": baseline,
        "versions": {name: version(name) for name in ("inseq", "torch", "transformers")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
