"""Attribution of a whole generated answer: one row of scores for each of its tokens.

An answer of T tokens after a prompt of P tokens is T predictions. Prediction t was made after
reading P + t tokens, the prompt and the answer so far, and is explained by those: a matrix
[T, P + T - 1], whose columns are all tokens that were read (the last output token never was) and
whose row t is zero from column P + t on, for what was not there yet.
"""

import contextlib
import re
import time
import unicodedata
from dataclasses import dataclass

import torch
from torch import nn

from helpers.attribution import METHODS, attribute
from helpers.attribution.engine import (
    AnswerHead,
    embed_prompt,
    frozen,
    in_batches,
    working_precision,
)
from helpers.attribution.path import (
    FEWEST_CUT,
    FIRST_EVALUATIONS,
    LEAST_WIDTH,
    baseline_embeds,
    completeness_gap,
    halve,
    simpson,
)
from helpers.errors import InputError
from helpers.questions import Question, check_question, token_labels


@dataclass(frozen=True)
class AnswerAttribution:
    """Scores of every output token over the tokens before it, with their evidence.

    ``scores``         FloatTensor [T, P + T - 1] on the CPU; in logits where the method has a sign
    ``labels``         the P + T - 1 tokens that were read, ``targets`` the T that were written
    ``prompt_tokens``  P, the column at which the answer itself begins
    ``gaps``           FloatTensor [T], the completeness gap of each row; ``None`` where the method
                       does not promise that its scores add up
    ``closed``         BoolTensor [T], whether that gap came down to the tolerance; or ``None``
    ``errors``         the estimated error of each score, of the shape of ``scores``; or ``None``
    ``evaluations``    rows run forward in order to take gradients, ``backwards`` the backward
                       passes through one row: T for each row that all outputs share
    ``forwards``       rows that were only run forward
    ``signed``         whether a negative score means "pushed this token away"
    """

    scores: torch.Tensor
    labels: list[str]
    targets: list[str]
    prompt_tokens: int
    gaps: torch.Tensor | None = None
    closed: torch.Tensor | None = None
    errors: torch.Tensor | None = None
    evaluations: int = 0
    backwards: int = 0
    forwards: int = 0
    signed: bool = True
    method: str = ""
    seconds: float = 0.0


# --- the answer --------------------------------------------------------------------------------


def answer(model, tokenizer, prompt, max_new_tokens=8, chat=False, runner_up=False):
    """The model's own answer, greedily generated, as one ``Question`` for each output token.

    Question t has the prompt and the first t output tokens as its ``input_ids`` [1, P + t], and
    output token t as its target. An end-of-text token that the model wrote is part of the answer:
    to stop is a prediction too. ``chat=True`` puts the prompt through the chat template, and
    ``runner_up=True`` asks why each token rather than the one the model liked second best there.

    Raises ``InputError`` for fewer than one new token, for a prompt that ``ask`` would refuse, and
    where prompt and answer are longer than the model's context.

    notebooks/13_answers.ipynb takes it apart.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: an answer has at least 1 token.")
    context = model.config.max_position_embeddings
    prompt_ids, _, _ = check_question(tokenizer, prompt, chat=chat, context=context)
    if len(prompt_ids) + max_new_tokens > context:
        raise InputError(
            f"The prompt is {len(prompt_ids):,} tokens long, the answer may take {max_new_tokens:,}"
            f", and the model reads at most {context:,}: shorten the prompt or the answer."
        )
    input_ids = torch.tensor([prompt_ids], device=model.get_input_embeddings().weight.device)
    with torch.inference_mode():
        input_ids = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # what a model's own settings say about sampling does not apply
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
        foils = _runners_up(model, input_ids, len(prompt_ids)) if runner_up else None
    return answer_questions(tokenizer, prompt, input_ids, len(prompt_ids), foils)


def _runners_up(model, input_ids, prompt_tokens):
    """The most likely token at each step of the answer but for the one that stands there."""
    written = input_ids[0, prompt_tokens:]  # [T]
    output = model(input_ids[:, :-1], use_cache=False, logits_to_keep=len(written))
    return output.logits[0].scatter(1, written[:, None], -torch.inf).argmax(dim=-1).tolist()


def answer_questions(tokenizer, prompt, input_ids, prompt_tokens, foils=None):
    """One ``Question`` for each token of ``input_ids`` [1, P + T] from ``prompt_tokens`` = P on.

    Any text can stand in the place of the answer, whether the model wrote it or not. ``foils``
    are T token ids, one to compare each with, or ``None``.
    """
    ids = input_ids[0].tolist()
    labels = token_labels(tokenizer, ids)
    answered = len(ids) - prompt_tokens
    return [
        Question(
            prompt=prompt,
            input_ids=input_ids[:, :read].clone(),  # generate's output is an inference tensor
            labels=labels[:read],
            target=ids[read],
            foil=foil,
            target_label=labels[read],
            foil_label=None if foil is None else tokenizer.decode([foil]),
        )
        for read, foil in enumerate(foils or [None] * answered, start=prompt_tokens)
    ]


# --- its attribution ---------------------------------------------------------------------------


def attribute_answer(model, questions, method, *, shared=True, precision=None, **options):
    """The attribution of a whole answer by ``method``, a key of ``METHODS``.

    ``questions`` is what ``answer`` returned. A causal model computes a position from those before
    it alone, so one pass over prompt and answer holds the passes over all of its prefixes. The
    methods in ``SHARED`` use that; the others, and all with ``shared=False``, take one question at
    a time, which gives the same numbers from more rows. Occlusion gains most; a gradient needs its
    own backward pass for each output all the same, and integrated gradients may even lose: the
    pieces of their path are halved for all outputs where one of them misses. ``precision`` and
    ``options`` are those of ``attribute``; ``max_evaluations`` is for the answer where work is
    shared, else for each token. The model is left as it was found.

    Raises ``InputError`` for an unknown method, and whatever ``attribute`` raises.

    notebooks/13_answers.ipynb takes it apart.
    """
    if method not in METHODS:
        choose = ", ".join(METHODS)
        raise InputError(f"There is no method {method!r}: choose from {choose}.")
    started = time.perf_counter()
    if shared and method in SHARED:
        with (
            frozen(model),
            working_precision(model, precision),
            _answers_only(model, questions) as places,
        ):
            fields = SHARED[method](model, questions[-1], places, **options)
    else:
        fields = _one_by_one(model, questions, method, precision=precision, **options)
    prompt_tokens = len(questions[0].labels)
    for name in ("scores", "errors"):
        if fields.get(name) is not None:  # nothing from columns that a row's model had not read
            fields[name] = fields[name].detach().float().cpu().tril(prompt_tokens - 1)
    return AnswerAttribution(
        **fields,
        labels=questions[-1].labels,
        targets=[question.target_label for question in questions],
        prompt_tokens=prompt_tokens,
        method=method,
        seconds=time.perf_counter() - started,
    )


def _one_by_one(model, questions, method, **options):
    """Fields of ``AnswerAttribution``, from one attribution for each output token."""
    results = [attribute(model, each, method, **options) for each in questions]

    def rows(name):
        found = [getattr(result, name) for result in results]
        if found[0] is None:
            return None
        if isinstance(found[0], torch.Tensor):
            return nn.utils.rnn.pad_sequence(found, batch_first=True)  # zeros to the right
        return torch.tensor(found)

    evaluations = sum(result.evaluations for result in results)
    return {
        "scores": rows("scores"),
        "gaps": rows("gap"),
        "closed": rows("closed"),
        "errors": rows("errors"),
        "evaluations": evaluations,
        "backwards": evaluations,
        "forwards": sum(result.forwards for result in results),
        "signed": results[0].signed,
    }


# --- one pass for all outputs ------------------------------------------------------------------


@contextlib.contextmanager
def _answers_only(model, questions):
    """Let the model compute the logits of the answer's tokens and foils only, while inside.

    Gives their places among the logits: ``(targets, foils)``, T each, foils ``None`` where none
    were asked. Rows x T x vocabulary would be by far the largest tensor, and T numbers of each row
    are read. As in ``answer_only``, a model whose output layer is not a plain matrix, or lies
    outside of memory, is left as it is.
    """
    targets = [question.target for question in questions]
    foils = [question.foil for question in questions if question.foil is not None]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
        yield targets, foils or None
        return
    places = list(range(len(targets) + len(foils)))
    try:
        model.set_output_embeddings(AnswerHead(head, targets + foils))
        yield places[: len(targets)], places[len(targets) :] or None
    finally:
        model.set_output_embeddings(head)


def _objectives(model, embeds, places):
    """Every output token's logit, less its foil's, for ``embeds`` [rows, seq, dim]: [rows, T]."""
    targets, foils = places
    steps = range(len(targets))
    logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=len(targets)).logits
    if foils is None:
        return logits[:, steps, targets].float()
    return logits[:, steps, targets].float() - logits[:, steps, foils].float()


def _reactions(model, rows, places, of):
    """Objectives [rows, T], and ``of`` the gradient of each one at ``rows``: [rows, T, seq].

    One forward pass serves all outputs; each has a backward pass of its own.
    """
    rows = rows.detach().requires_grad_(True)
    values = _objectives(model, rows, places)
    found = [
        of(torch.autograd.grad(value.sum(), rows, retain_graph=True)[0])
        for value in values.unbind(dim=1)
    ]
    return values.detach(), torch.stack(found, dim=1)


def _saliency(model, whole, places):
    embeds = embed_prompt(model, whole)
    _, norms = _reactions(model, embeds, places, lambda grads: grads.norm(dim=-1))
    return {"scores": norms[0], "evaluations": 1, "backwards": norms.shape[1], "signed": False}


def _gradient_x_input(model, whole, places):
    embeds = embed_prompt(model, whole)
    _, products = _reactions(model, embeds, places, lambda grads: (grads * embeds).sum(dim=-1))
    return {"scores": products[0], "evaluations": 1, "backwards": products.shape[1]}


def _occlusion(model, whole, places, baseline="mean"):
    """One row for each token that was read: what it loses, every later output shows."""
    embeds = embed_prompt(model, whole)
    blank = baseline_embeds(model, whole, baseline)
    seq = embeds.shape[1]

    def run(some):
        rows = embeds.repeat(len(some), 1, 1)  # [rows, seq, dim]
        rows[range(len(some)), some] = blank[0, some]
        return _objectives(model, rows, places)

    with torch.inference_mode():
        written = _objectives(model, embeds, places)  # [1, T]
        values = torch.cat(in_batches(model, run, torch.arange(seq), seq))  # [seq, T]
    return {"scores": (written - values).T, "forwards": seq + 1}


def _integrated_gradients(
    model, whole, places, baseline="mean", tolerance=0.02, max_evaluations=2000
):
    """``integrated_gradients`` of every output: the path of a prefix begins the path of the whole.

    The outputs share the points of the path, and a piece is halved for whichever misses on it.
    """
    if not tolerance > 0 or max_evaluations < FIRST_EVALUATIONS:
        raise InputError(
            f"Integrated gradients need a tolerance above 0, not {tolerance}, and at least "
            f"{FIRST_EVALUATIONS} evaluations, not {max_evaluations}."
        )
    outputs = len(places[0])
    start = baseline_embeds(model, whole, baseline)
    step = embed_prompt(model, whole) - start  # [1, seq, dim]

    def run(some):
        rows = start + some.to(step)[:, None, None] * step
        values, slopes = _reactions(model, rows, places, lambda g: (g * step).sum(dim=-1))
        slopes = slopes.where(slopes.isfinite(), 0)  # missed, not invented: see path_slopes
        return values.double().cpu(), slopes.double().cpu()

    def path(alphas):
        values, slopes = zip(*in_batches(model, run, alphas, step.shape[1]), strict=True)
        return torch.cat(values), torch.cat(slopes).flatten(1)

    fields = _refine_together(path, outputs, tolerance, max_evaluations)
    return {**fields, "backwards": fields["evaluations"] * outputs}


def _refine_together(run, outputs, tolerance, max_evaluations):
    """``refine`` for several objectives of the same points, until each of them is closed.

    ``run`` gives values [points, outputs] and slopes [points, outputs x seq] at alphas. What an
    output misses counts in units of what it may miss, so that none waits for the others.
    """
    alphas = torch.linspace(0, 1, (FIRST_EVALUATIONS + 1) // 2, dtype=torch.float64)
    pieces = [some.unfold(0, 3, 2) for some in (alphas, *run(alphas))]
    pieces[1:] = [some.transpose(1, 2) for some in pieces[1:]]  # [pieces, 3, ...]
    moved = pieces[1][-1, 2] - pieces[1][0, 0]  # [outputs]
    scores = simpson(pieces[0], pieces[2])  # [pieces, outputs x seq]
    errors, evaluations = torch.zeros_like(scores), len(alphas)
    cut = torch.ones(len(scores), dtype=torch.bool)
    while cut.any():
        halves = halve(run, *(some[cut] for some in pieces))
        evaluations += len(halves[0])
        parts = simpson(halves[0], halves[2])
        change = (parts.unflatten(0, (-1, 2)).sum(dim=1) - scores[cut]).abs() / 15
        pieces = [torch.cat([old[~cut], new]) for old, new in zip(pieces, halves, strict=True)]
        scores = torch.cat([scores[~cut], parts])
        errors = torch.cat([errors[~cut], (change / 2).repeat_interleave(2, dim=0)])

        totals = scores.unflatten(1, (outputs, -1)).sum(dim=2)  # [pieces, outputs]
        missing = (pieces[1][:, 2] - pieces[1][:, 0] - totals).abs() / moved.abs().clamp(min=1)
        missing[pieces[0][:, 2] - pieces[0][:, 0] <= LEAST_WIDTH] = 0
        gaps = torch.tensor(list(map(completeness_gap, totals.unbind(dim=1), moved)))
        settled = missing.sum(dim=0) <= 5 * tolerance
        waiting = ~((gaps <= tolerance / 2) & settled)
        if not waiting.any():
            break
        worst_of = missing[:, waiting].amax(dim=1)  # [pieces]
        worst = worst_of.argsort(descending=True)
        cut = worst_of >= worst_of.max() / 8
        cut[worst[:FEWEST_CUT]] = True
        cut[worst[max(0, max_evaluations - evaluations) // 2 :]] = False
        cut &= worst_of > 0
    return {
        "scores": scores.sum(dim=0).unflatten(0, (outputs, -1)),
        "errors": errors.sum(dim=0).unflatten(0, (outputs, -1)),
        "gaps": gaps,
        "closed": (gaps <= tolerance) & settled,
        "evaluations": evaluations,
    }


SHARED = {
    "saliency": _saliency,
    "gradient_x_input": _gradient_x_input,
    "integrated_gradients": _integrated_gradients,
    "occlusion": _occlusion,
}


# --- words -------------------------------------------------------------------------------------


def merge_words(labels, scores):
    """Tokens put together to words, and their scores added up: ``(words, scores)``.

    ``scores`` is a tensor [..., seq], one column a label; the result has one a word. Two tokens
    belong to one word where a letter, mark or digit meets another, so a space begins a word,
    punctuation stands alone, and text written without spaces stays whole. The parts of a character
    that takes several tokens, labelled ``你[1/2]`` and ``你[2/2]``, are put together as well.

    Introduced in notebooks/13_answers.ipynb.
    """
    words, places = [], []
    for label in labels:
        part = re.fullmatch(r"(.+)\[(\d+)/\d+\]", label, re.DOTALL)
        text = label if part is None else part[1]
        joints = words[-1].strip(" ")[-1:] + text[:1] if words else " "
        inside = all(unicodedata.category(character)[0] in "LMN" for character in joints)
        if part is not None and part[2] != "1":
            text = ""  # the rest of a character that was spelt with its first part
        elif not inside:
            words.append("")
        words[-1] += text
        places.append(len(words) - 1)
    merged = scores.new_zeros(*scores.shape[:-1], len(words))
    return words, merged.index_add(-1, torch.tensor(places), scores)
