"""Attributions of many prompts in one pass.

Prompts are put together by their exact length in tokens, so no padding and no mask are needed, and
a row gives the numbers that it gives alone. A row has a target and a foil of its own, which stand
in for the output layer (``AnswerHeads``); every method then sees the same question of all rows:
target 0, foil 1.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaForCausalLM

from helpers.attribution import METHODS, Attribution, attribute
from helpers.attribution.engine import (
    attending,
    attention_weights,
    contrast,
    frozen,
    in_batches,
    logits_after,
    objective,
    objective_gradient,
    output_layer,
    plain_output_layer,
    prompt_cache,
    sdpa,
)
from helpers.attribution.path import baseline_embeds, completeness_gap
from helpers.attribution.perturbation import FULL_PASS
from helpers.attribution.relevance import (
    attention_rule,
    identity_rule,
    product_rule,
    relevance_rules,
    rules_in_place,
)
from helpers.errors import InputError
from helpers.questions import Question, read_question, with_target

LOGITS_AT_ONCE = 2**24  # numbers of the whole vocabulary's logits that are held together
ROWS = SimpleNamespace(target=0, foil=1)  # the question of every row, as AnswerHeads reads it


@dataclass(frozen=True)
class Answered:
    """What is known of one question after its batch was run.

    ``target`` is the token id that was explained: the question's own, or where that was left open
    the model's most likely next token. ``top``, ``top_probability`` and ``probability`` are the
    most likely next token, its probability and the target's. ``results`` holds an ``Attribution``
    for each method, and nothing where the foil turned out to be the target: there is then nothing
    to compare.
    """

    target: int
    top: int
    top_probability: float
    probability: float
    results: dict[str, Attribution]


def ask_many(model, tokenizer, entries, *, open_targets=False):
    """Many questions at once: what ``ask`` makes of each of ``entries``.

    An entry is a dict of ``ask``'s arguments: ``prompt`` and, as wanted, ``target``, ``foil`` and
    ``chat``. Returns a list in the same order with a ``Question``, or the ``InputError`` that
    ``ask`` raises, at each place. The model's own next tokens are found in batches; with
    ``open_targets`` they are not: ``target`` and ``target_label`` stay ``None`` for
    ``attribute_many`` to find in a pass that it needs anyway, see ``completed``.
    """
    asked = [_read(model, tokenizer, entry) for entry in entries]
    if not open_targets:
        open_places = [
            place
            for place, question in enumerate(asked)
            if isinstance(question, Question) and question.target is None
        ]
        answers = attribute_many(model, [asked[place] for place in open_places], ())
        for place, answer in zip(open_places, answers, strict=True):
            asked[place] = completed(tokenizer, asked[place], answer)
    return asked


def _read(model, tokenizer, entry):
    """The question of an entry, its target open where none is named, or the ``InputError``."""
    try:
        return read_question(model, tokenizer, **entry)
    except InputError as error:
        return error


def completed(tokenizer, question, answer):
    """``question`` with the target that its ``answer`` has, or the ``InputError`` of ``ask``."""
    try:
        return with_target(tokenizer, question, answer.target)
    except InputError as error:  # the foil is the model's own next token
        return error


def attribute_many(model, questions, methods):
    """What each of ``methods``, keys of ``METHODS``, says of each question: a list of ``Answered``.

    In the order of ``questions``, whose ``target`` may be ``None`` for the model's own next token.
    The scores are those of ``attribute`` on each question, to float32's rounding, and so are
    ``gap``, ``evaluations`` and ``forwards``. ``seconds`` is a pass's time shared evenly among its
    rows, and among the methods that it gave: saliency and gradient x input read the same gradient,
    and relevance goes back from the same forward pass.

    Methods that have no form for many prompts, and all methods on a model whose output layer is
    not a plain matrix, run one question at a time. The model is left as it was found.

    Raises ``InputError``, before anything is run, for an unknown method and for one that does not
    support this model.
    """
    questions, methods = list(questions), list(dict.fromkeys(methods))
    for method in methods:
        if method not in METHODS:
            raise InputError(f"There is no method {method!r}: choose from {', '.join(METHODS)}.")
    if questions:
        _refuse_unsupported(model, questions[0], methods)
    plain = plain_output_layer(model) is not None
    together = [method for method in methods if plain and method in BATCHED]
    by_length = {}
    for place, question in enumerate(questions):
        by_length.setdefault(question.input_ids.shape[1], []).append(place)
    answers = {}
    with frozen(model):
        for seq, places in sorted(by_length.items()):

            def run(some):
                return _run_batch(model, [questions[place] for place in some], together)

            # two ways back keep most of what two passes would
            room = 2 * seq if _gradients_and_relevance in _passes(together) else seq
            found = [answer for some in in_batches(model, run, places, room) for answer in some]
            answers.update(zip(places, found, strict=True))
    return [
        _with_the_rest(model, question, answers[place], methods)
        for place, question in enumerate(questions)
    ]


def _with_the_rest(model, question, answer, methods):
    """``answer`` with the results of all ``methods``, in their order; those it lacks run singly."""
    if answer.target == question.foil:
        return replace(answer, results={})
    single = replace(question, target=answer.target)
    known = answer.results
    results = {m: known[m] if m in known else attribute(model, single, m) for m in methods}
    return replace(answer, results=results)


def _refuse_unsupported(model, question, methods):
    """Let the methods that are written for Llamas alone say so, in their own words."""
    for method in ("relevance", "alti_logit"):
        if method in methods and not isinstance(model, LlamaForCausalLM):
            METHODS[method](model, question)


# --- one batch ---------------------------------------------------------------------------------


def _run_batch(model, questions, methods):
    """``Answered`` for each of ``questions``, which all have one length, by batched methods."""
    input_ids = torch.cat([question.input_ids for question in questions])  # [rows, seq]
    results = [{} for _ in questions]
    head = plain_output_layer(model)
    predictions = None
    if head is None or not isinstance(model, LlamaForCausalLM):
        # another model may do more to its logits than its output layer does
        predictions = _predictions(_next_logits(model, input_ids), questions)
    if head is not None:
        heads = AnswerHeads(head, questions, predictions)
        with output_layer(model, heads):
            for run in _passes(methods):
                _add_results(results, methods, run, model, input_ids, questions)
            if heads.predictions is None:  # no method ran the model
                _next_logits(model, input_ids)
        predictions = heads.predictions
    return [
        Answered(*prediction, found) for prediction, found in zip(predictions, results, strict=True)
    ]


def _passes(methods):
    """The functions that give ``methods``, each once."""
    if "relevance" in methods and {"saliency", "gradient_x_input"} & set(methods):
        rest = [name for name in methods if BATCHED[name] not in (_gradients, _relevance)]
        return [_gradients_and_relevance, *dict.fromkeys(BATCHED[name] for name in rest)]
    return list(dict.fromkeys(BATCHED[name] for name in methods))


def _next_logits(model, input_ids):
    with torch.inference_mode():
        return model(input_ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def _add_results(results, methods, run, model, input_ids, questions):
    began = time.perf_counter()
    found = run(model, input_ids, questions)  # of one or more methods, an Attribution a row
    found = {method: rows for method, rows in found.items() if method in methods}
    seconds = (time.perf_counter() - began) / len(found) / len(questions)
    for method, rows in found.items():
        for row, result in enumerate(rows):
            results[row][method] = replace(result, method=method, seconds=seconds)


class AnswerHeads(nn.Module):
    """For each row, those rows of an output layer that its question is about; full precision.

    Gives logits [rows, 1, 2] of target and foil; a question without a foil has a foil of logit 0.
    Rows may be the questions in order several times over. What a question left open is read off
    the whole output layer at the first pass.
    """

    def __init__(self, head, questions, predictions=None):
        super().__init__()
        self.whole = [head]  # in a list, so that it is no part of this module
        self.questions = questions
        self.predictions = predictions
        self.weight = self.bias = None

    def forward(self, hidden):
        (head,) = self.whole
        if self.predictions is None:
            self._predict(head, hidden.detach()[:, -1].to(head.weight.device))
        if self.weight is None:
            self._select(head)
        times = len(hidden) // len(self.questions)
        weight = self.weight.repeat(times, 1, 1)  # [rows, 2, dim]
        logits = hidden.float().to(weight.device) @ weight.transpose(1, 2)  # [rows, 1, 2]
        return logits if self.bias is None else logits + self.bias.repeat(times, 1, 1)

    def _predict(self, head, hidden):
        self.predictions, size = [], max(1, LOGITS_AT_ONCE // len(head.weight))
        with torch.no_grad():
            for start in range(0, len(hidden), size):
                some = slice(start, start + size)
                self.predictions += _predictions(head(hidden[some]), self.questions[some])

    def _select(self, head):
        # made outside of inference mode, since a later pass may want a gradient through them
        with torch.inference_mode(False), torch.no_grad():
            target_ids = [target for target, *_ in self.predictions]
            foil_ids = [0 if q.foil is None else q.foil for q in self.questions]
            ids = torch.tensor([target_ids, foil_ids], device=head.weight.device).T  # [rows, 2]
            there = torch.tensor([[True, q.foil is not None] for q in self.questions])
            there = there.to(ids.device)
            self.weight = head.weight.detach()[ids].float() * there[..., None]
            if head.bias is not None:
                self.bias = (head.bias.detach()[ids].float() * there)[:, None]


def _predictions(logits, questions):
    """``(target, top, top_probability, probability)`` for each row of logits [rows, vocab]."""
    logits = logits.float()
    tops = logits.argmax(dim=-1).tolist()
    targets = [
        top if question.target is None else question.target
        for top, question in zip(tops, questions, strict=True)
    ]
    ids = torch.tensor([tops, targets], device=logits.device).T  # [rows, 2]
    whole = logits.logsumexp(dim=-1, keepdim=True)
    probabilities = (logits.gather(1, ids) - whole).exp().tolist()
    return [
        (target, top, *both) for target, top, both in zip(targets, tops, probabilities, strict=True)
    ]


# --- the methods, for rows that are prompts ----------------------------------------------------


def _embed(model, input_ids):
    return model.get_input_embeddings()(input_ids).detach()  # [rows, seq, dim]


def _attributions(scores, gaps=None, **evidence):
    """An ``Attribution`` a row, of scores [rows, seq]."""
    gaps = [None] * len(scores) if gaps is None else gaps
    rows = scores.detach().float().cpu().unbind()
    return [Attribution(row, gap=gap, **evidence) for row, gap in zip(rows, gaps, strict=True)]


def _gradients(model, input_ids, questions):
    """Saliency and gradient x input, of one gradient."""
    embeds = _embed(model, input_ids)
    return _of_gradient(embeds, objective_gradient(model, embeds, ROWS))


def _of_gradient(embeds, grad):
    return {
        "saliency": _attributions(grad.norm(dim=-1), evaluations=1, signed=False),
        "gradient_x_input": _attributions((grad * embeds).sum(dim=-1), evaluations=1),
    }


def _relevance(model, input_ids, questions):
    embeds = _embed(model, input_ids).requires_grad_(True)
    with relevance_rules(model):
        values = objective(model, embeds, ROWS)  # [rows]
        (slope,) = torch.autograd.grad(values.sum(), embeds)
    return _of_slope(embeds.detach(), slope, values.detach())


def _of_slope(embeds, slope, values):
    scores = (slope.float() * embeds.float()).sum(dim=-1)  # [rows, seq]
    gaps = [completeness_gap(*both) for both in zip(scores.cpu(), values.cpu(), strict=True)]
    return {"relevance": _attributions(scores, gaps, evaluations=1)}


def _gradients_and_relevance(model, input_ids, questions):
    """Both of the above, of one forward pass and two backward ones: relevance changes no value."""
    embeds = _embed(model, input_ids).requires_grad_(True)
    with switchable_rules(model) as switch:
        values = objective(model, embeds, ROWS)  # [rows]
        (grad,) = torch.autograd.grad(values.sum(), embeds, retain_graph=True)
        switch.on = True
        (slope,) = torch.autograd.grad(values.sum(), embeds)
    embeds = embeds.detach()
    return _of_gradient(embeds, grad) | _of_slope(embeds, slope, values.detach())


@contextlib.contextmanager
def switchable_rules(model):
    """``relevance_rules`` that can be switched on between a forward pass and a backward one.

    Gives an object with ``on``, false at first: what is then handed back is the gradient.
    """
    switch = SimpleNamespace(on=False)

    def either(value, ruled):
        return Either.apply(value, ruled, switch)

    def after(module, args, out):
        return either(out, identity_rule(module, args, out))

    def before(module, args):
        return (either(*args, *product_rule(module, args)),)

    def attend_by_either(module, query, key, value, mask, **options):
        def attend(module, *ruled, **options):
            *ruled, mask = ruled
            inputs = [either(*both) for both in zip((query, key, value), ruled, strict=True)]
            return sdpa(module, *inputs, mask, **options)

        return attention_rule(attend)(module, query, key, value, mask, **options)

    with rules_in_place(model, after, before, attend_by_either):
        yield switch


class Either(torch.autograd.Function):
    """A value with two ways back: through ``value``, or with the switch on through ``ruled``."""

    @staticmethod
    def forward(ctx, value, ruled, switch):
        ctx.switch = switch
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return (None, grad, None) if ctx.switch.on else (grad, None, None)


def _occlusion(model, input_ids, questions):
    """Replace one position at a time, in all prompts; what comes before it is computed once."""
    rows, seq = input_ids.shape
    values, position = [], 0
    with torch.inference_mode():
        embeds = _embed(model, input_ids)
        blank = baseline_embeds(model, questions[0])[:, 0]  # [1, dim], the same at each position
        logits, cache = prompt_cache(model, embeds)
        whole = contrast(logits, ROWS)  # [rows]
        while position < seq:
            first = 0 if cache is None else position
            # several positions in a pass where the prompts are too few to fill one
            count = min(seq - position, max(1, FULL_PASS // (rows * (seq - first))))
            variants = embeds[:, first:].repeat(count, 1, 1, 1)  # [count, rows, seq - first, dim]
            for number in range(count):
                variants[number, :, position + number - first] = blank
            logits = logits_after(model, variants.flatten(0, 1), first, cache)
            values.append(contrast(logits, ROWS).view(count, rows))
            position += count
    scores = whole[:, None] - torch.cat(values).T  # [rows, seq]
    return {"occlusion": _attributions(scores, forwards=seq + 1)}


def _attention(model, input_ids, questions):
    layers = []

    def keep_last_rows(module, query, key, value, mask, scaling=None, **options):
        last = query[:, :, -1].unflatten(1, (key.shape[1], -1))  # [rows, kv heads, per kv, dim]
        weights = (last @ key.transpose(2, 3)).float() * scaling  # [rows, kv heads, per kv, seq]
        if mask is not None:  # a sliding window
            weights = weights.masked_fill(~mask[:, :, -1:], -torch.inf)
        layers.append(weights.softmax(dim=-1).mean(dim=(1, 2)).cpu())
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)

    with torch.inference_mode(), attending(model, keep_last_rows):
        model(input_ids, use_cache=False, logits_to_keep=1)
    scores = torch.stack(layers).mean(dim=0)  # [rows, seq]
    return {"attention": _attributions(scores, forwards=1, signed=False)}


def _attention_rollout(model, input_ids, questions):
    same = flow = torch.eye(input_ids.shape[1], device=input_ids.device)  # [seq, seq]

    def roll_rows(module, query, key, value, mask, scaling=None, **options):
        nonlocal flow
        weights = torch.stack(
            [
                attention_weights(query[row : row + 1], key[row : row + 1], mask, scaling).mean(0)
                for row in range(len(query))
            ]
        ).to(flow.device)  # [rows, seq, seq]
        flow = (0.5 * weights + 0.5 * same) @ flow
        return sdpa(module, query, key, value, mask, scaling=scaling, **options)

    with torch.inference_mode(), attending(model, roll_rows):
        model(input_ids, use_cache=False, logits_to_keep=1)
    return {"attention_rollout": _attributions(flow[:, -1], forwards=1, signed=False)}


def _random(model, input_ids, questions):
    return {"random": [METHODS["random"](model, question) for question in questions]}


# each gives, for itself and whatever else it finds on the way, an Attribution a row
BATCHED = {
    "saliency": _gradients,
    "gradient_x_input": _gradients,
    "relevance": _relevance,
    "occlusion": _occlusion,
    "attention": _attention,
    "attention_rollout": _attention_rollout,
    "random": _random,
}
