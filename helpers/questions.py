"""One question, fixed once, that every attribution method then answers.

A question is what a model reads, the tokens whose probability is to be explained (the target) and,
if wanted, the tokens they are compared with (the foil). What is explained is

    log p(target | prompt) - log p(foil | prompt)

by the chain rule over as many tokens as each has; without a foil, the first term alone. Of three
and more options the likeliest is the target, unless one is named, and the likeliest of the others
the foil.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.errors import InputError
from helpers.machine import products_in_float32
from helpers.progress import advance, progress
from helpers.prompts import (
    FINE,
    Prompt,
    Unit,
    bad_options,
    bad_prompt,
    continuation,
    decoded,
    half_a_pair,
    prompt_units,
    read_options,
    read_prompt,
    spelled_by,
    token_labels,
    word_places,
)

OBJECTIVES = ("log_probability", "logit")
WEAK = 0.01  # a probability below which the model hardly meant it
HALF = (torch.bfloat16, torch.float16)
PORTION = 2048  # rows of the output layer that are widened to float32 together
BEST = 10  # a target outside of so many next tokens is told


class Rival(NamedTuple):
    """A text with or without its leading space, beside the one that was asked for."""

    token: int  # the first of the text that was asked for
    other: int  # the first of its rival
    label: str
    other_label: str


class Option(NamedTuple):
    """One of the texts that a question compares; ``label`` is that of its token ids."""

    ids: tuple[int, ...]
    label: str
    log_probability: float | None = None  # of the whole, given the prompt, in nats; None: not known
    notes: tuple[str, ...] = ()  # what makes it a weak target or foil
    rival: tuple[Rival, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is read, and the prediction about it that is to be explained.

    ``prompt``        the text or the messages, as given
    ``input_ids``     LongTensor [1, seq] on the model's device: what is read before the target
    ``labels``        seq readable strings; ``parts`` says whose words each token is
    ``units``         what gets a score: a list of ``Unit``. An answer of several tokens without a
                      foil adds its own earlier tokens, with ``part`` ``"answer"``: later tokens
                      were written after reading them. With a foil only what was read is explained
    ``sources``       the passages that were named as units; what stands around them is not ranked
    ``target``, ``foil``  token ids as tuples; ``foil`` is ``None`` without one
    ``target_label``, ``foil_label``  the same as text; ``answer`` without control tokens
    ``options``       all texts that are compared, where they are more than target and foil: a tuple
                      of ``Option`` in the order in which they were given
    ``probability``   of the whole target, given the prompt
    ``notes``         sentences: what makes the question a weak one
    ``top``, ``top_probability``  the model's own next token after the prompt, and its probability
    ``own``           whether the target is what the model itself goes on with
    ``rank``          the place of the target's first token among the next tokens, from 1
    ``objective``     ``"log_probability"``, or ``"logit"`` for the raw logits of the usual code

    ``target`` and what depends on it are ``None`` while a question is open: see ``attribute_all``.
    With options the foil is open, too.
    """

    prompt: Any
    input_ids: torch.Tensor
    labels: list[str]
    parts: list[str]
    units: list[Unit]
    target: tuple[int, ...] | None = None
    foil: tuple[int, ...] | None = None
    target_label: str | None = None
    foil_label: str | None = None
    answer: str | None = None
    probability: float | None = None
    notes: tuple[str, ...] = ()
    top: int | None = None
    top_probability: float | None = None
    rank: int | None = None
    own: bool | None = None
    objective: str = "log_probability"
    grouping: str = "tokens"
    sources: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    named: int | None = field(default=None, repr=False)  # the option that is to be the target
    read: Prompt | None = field(default=None, repr=False, compare=False)
    tokenizer: Any = field(default=None, repr=False, compare=False)
    rival: tuple[Rival, ...] = field(default=(), repr=False, compare=False)
    greedy: bool = field(default=False, repr=False, compare=False)

    def __str__(self) -> str:
        """Why " Riga"?, or why " Riga" rather than " Tallinn"?"""
        rather = "" if self.foil is None else f" rather than {self.foil_label!r}"
        return f"why {self.target_label!r}{rather}?"

    @property
    def undecided(self) -> bool:
        """Whether it has options, and which are target and foil is for the model to say."""
        return self.target is None and bool(self.options)

    def places(self, words: str) -> list[list[int]]:
        """Positions of each occurrence of whole ``words`` in what was written; see there."""
        return word_places(self.read, words) if self.read else []


@dataclass(frozen=True)
class Facts:
    """What one pass says of a question: see the fields of the same names in ``Question``."""

    target: tuple[int, ...]
    probability: float
    top: int
    top_probability: float
    lead: float  # nats between the model's own next token and the second
    rank: int
    own: int  # how many target tokens are the model's own choices, counted from the first
    rivals: tuple[tuple[float, float], ...]  # the probabilities of both tokens of each ``Rival``


_TOLD = ("probability", "top", "top_probability", "rank")  # what a question keeps of its facts


def ask(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[dict],
    *,
    target: str | None = None,
    foil: str | None = None,
    target_ids: Sequence[int] | None = None,
    foil_ids: Sequence[int] | None = None,
    answer: int | str | bool | None = None,
    options: Sequence[str] | None = None,
    units: str = "tokens",
    sources: Sequence[str] | None = None,
    chat: bool = False,
    raw: bool = False,
    objective: str = "log_probability",
) -> Question:
    """Fix a question: why does ``prompt`` lead to ``target`` (rather than to ``foil``)?

    ``prompt`` is a text, or a list of messages with ``role`` and ``content``, the last of which
    may be the beginning of the assistant's; ``chat=True`` puts a text through the template as one
    message of the user. ``target`` and ``foil`` are texts of any length, read as they go on after
    the prompt (mind the leading space: ``" Riga"``); token ids go by ``target_ids`` and
    ``foil_ids``. ``answer`` is a number of tokens, for the model's own greedy answer of at most so
    many, or a text. ``options`` are texts, one of which ``target`` may repeat: of two the first is
    the target and the other the foil; of more, the likeliest is compared with the next, or the
    named one with the likeliest of the others. With none of these the target is the model's own
    next token.

    ``units`` is ``"tokens"``, ``"words"``, ``"sentences"`` or ``"turns"``; ``sources`` are passages
    of the prompt that become the units, with the sentences around them. ``raw=True`` says that the
    prompt is a finished template, whose control tokens count.

    Raises ``InputError`` for what cannot mean anything; what is legal but weak is in ``notes``.

    notebooks/03_generation.ipynb takes it apart.
    """
    # the two functions name what is asked alike, so a name is written in the two signatures only
    return ask_of(model, read_question(**locals()))


def ask_of(model: Any, question: Question) -> Question:
    """``question`` completed by one pass over what it reads and its target.

    Of options, each that has several tokens takes a pass before that, and the others one together.
    """
    if question.undecided:
        question = with_likeliest(question, option_log_probabilities(model, question))
    logits = _logits(model, question, question.target or (-1,))
    return completed(question, read_facts(logits, question.target, question.rival))


def _logits(model, question, target):
    """The logits [tokens of the target, vocab] by which each of its tokens is chosen, float32."""
    ids = torch.cat([question.input_ids, question.input_ids.new_tensor([target[:-1]])], dim=1)
    with torch.inference_mode(), float32_logits(model):
        logits = model(ids, use_cache=False, logits_to_keep=len(target)).logits
    return logits[0, -len(target) :].float()


ANSWER = 40  # tokens of the model's own answer, where no number is given


def read_question(
    tokenizer: Any,
    prompt: str | Sequence[dict],
    *,
    target: str | None = None,
    foil: str | None = None,
    target_ids: Sequence[int] | None = None,
    foil_ids: Sequence[int] | None = None,
    answer: int | str | bool | None = None,
    options: Sequence[str] | None = None,
    units: str = "tokens",
    sources: Sequence[str] | None = None,
    chat: bool = False,
    raw: bool = False,
    objective: str = "log_probability",
    model: Any = None,
    context: int | None = None,
    vocabulary: int | None = None,
) -> Question:
    """What ``ask`` can say before the question is run: every check, and what is to be explained.

    ``model`` tells the longest text it reads and the size of its embedding table, and writes the
    answer where its own is asked for; without a model, ``context`` and ``vocabulary`` tell the
    sizes, and ``None`` checks neither. Without a target the question is open, and so is one of
    three options and more.
    """
    if objective not in OBJECTIVES:
        known = " or ".join(OBJECTIVES)
        raise InputError(f"There is no objective {objective!r}: use {known}.", field="objective")
    read = read_prompt(tokenizer, prompt, chat=chat, raw=raw)
    device = "cpu"
    if model is not None:
        table = model.get_input_embeddings().weight
        if table.is_meta:
            raise InputError(
                "The embedding table of this model is offloaded, and every method begins with its "
                "rows: keep that one in memory, as load_model does."
            )
        device, vocabulary = table.device, len(table)
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        context = getattr(config, "max_position_embeddings", None)
    notes: list[str] = []
    rivals: list[Rival] = []
    named = partial(_named, tokenizer, read, notes, rivals)
    compared: list[str] = []
    if options is not None:
        if target_ids is not None or foil_ids is not None:
            raise bad_options("It has options and token ids: keep one of them.")
        target, foil, compared = read_options(options, target, foil, answer)
    every = [_read_option(tokenizer, read, option) for option in compared]
    place = compared.index(target) if compared and target is not None else None
    target = None if compared else target  # read once, as an option
    ids, others = named("target", target, target_ids), named("foil", foil, foil_ids)
    if answer is not None and answer is not False:
        bad_answer = partial(InputError, field="answer")
        if ids is not None:
            raise bad_answer("Give a target or an answer, not both.")
        if others is not None:
            raise bad_answer("An answer has no foil: name target and foil, or the answer alone.")
        if isinstance(answer, str):
            ids = named("answer", answer)
        elif not isinstance(answer, int) or answer < 1:
            raise bad_answer(
                f"The answer {answer!r} is neither a text nor a number of tokens from 1."
            )
    room = ANSWER if answer is True else answer if isinstance(answer, int) else 0
    roles = [("target", ids), ("foil", others), *(("option", option.ids) for option in every)]
    room = max(room, *(len(some or ()) for _, some in roles))
    _check_size(tokenizer, read, roles, room, context, vocabulary)
    for role, some in roles[1:]:
        _check_tokens(tokenizer, role, some or ())
    _check_alternatives(every)
    grouping = "sources" if sources is not None else units
    chat_given = chat or not isinstance(prompt, str)
    if grouping not in FINE and not chat_given and sum(p != "template" for p in read.parts) == 1:
        raise InputError(
            f"The prompt is one token, which cannot be grouped into {grouping}: leave units out.",
            field="units" if sources is None else "sources",
        )
    if getattr(tokenizer, "chat_template", None) and not chat_given and not raw:
        notes.append(
            "The model has a chat template and was asked without it: messages or chat=True would "
            "ask as it was trained."
        )
    if read.typed:
        notes.append(
            f"Control tokens typed in the prompt were read as text: {', '.join(read.typed)}. "
            "raw=True takes a finished template."
        )
    question = Question(
        prompt=prompt,
        input_ids=torch.tensor([read.ids], device=device),
        labels=read.labels,
        parts=read.parts,
        units=prompt_units(read, units, sources),
        foil=others,
        foil_label=None if others is None else decoded(tokenizer, others, read.ids),
        notes=tuple(notes),
        objective=objective,
        grouping=grouping,
        sources=tuple(sources or ()),
        options=tuple(every),
        named=place,
        read=read,
        tokenizer=tokenizer,
        rival=tuple(rivals),
    )
    if ids is None and answer and model is not None:
        return with_answer(model, question, room)
    return question if ids is None else with_target(question, ids)


def option_log_probabilities(model: Any, question: Question) -> list[float]:
    """The log-probability of each option as a whole, given the prompt, in nats.

    A pass over the prompt for all options of one token together, and one for each other option.
    """
    first, found = None, []
    for option in question.options:
        alone = len(option.ids) == 1
        logits = first if alone and first is not None else _logits(model, question, option.ids)
        first = logits if alone else first
        ids = torch.tensor(option.ids, device=logits.device)
        found.append(float(logits.log_softmax(dim=-1).gather(1, ids[:, None]).sum()))
    return found


def with_likeliest(question: Question, log_probabilities: Sequence[float]) -> Question:
    """``question`` about its likeliest option, or the named one, rather than the next of them.

    ``log_probabilities`` are those of the options, in nats; of equal ones the first counts.
    """
    pairs = zip(question.options, log_probabilities, strict=True)
    options = tuple(option._replace(log_probability=value) for option, value in pairs)
    order = sorted(range(len(options)), key=lambda place: -log_probabilities[place])
    target = options[order[0] if question.named is None else question.named]
    foil = next(options[place] for place in order if options[place] is not target)
    question = replace(
        question,
        options=options,
        foil=foil.ids,
        foil_label=foil.label,
        notes=(*target.notes, *foil.notes, *question.notes),
        rival=(*target.rival, *foil.rival),
    )
    return with_target(question, target.ids)


def with_target(question: Question, target: Sequence[int]) -> Question:
    """``question`` about the token ids ``target``; ``InputError`` if they are its foil."""
    target, tokenizer = tuple(target), question.tokenizer
    _check_tokens(tokenizer, "target", target)
    before = question.input_ids[0].tolist()
    label = decoded(tokenizer, target, before)
    bad_foil = partial(InputError, field="foil")
    if target == question.foil:
        raise bad_foil(
            f"The foil {label!r} is the target itself, so there is nothing to compare: choose "
            "another foil."
        )
    if question.foil and all(a == b for a, b in zip(target, question.foil, strict=False)):
        raise bad_foil(
            f"The target {label!r} and the foil {question.foil_label!r} begin alike and one of "
            "them ends there, so they are no alternatives: write both to the end of a word."
        )
    units = [unit for unit in question.units if unit.part != "answer"]
    if question.foil is None and len(target) > 1:
        units += _answer_units(question, target, before)
    written = [each for each in target if each not in tokenizer.all_special_ids]
    text = decoded(tokenizer, written, before)
    return replace(question, target=target, target_label=label, answer=text, units=units)


def completed(question: Question, facts: Facts) -> Question:
    """``question`` with what a pass found, and with what makes it a weak one.

    Raises ``InputError`` if an open question's foil turns out to be the model's own next token.
    """
    tokenizer = question.tokenizer
    if question.target is None:
        question = with_target(question, facts.target)
    before, count = question.input_ids[0].tolist(), len(facts.target)
    own = facts.own == count or question.greedy  # whose passes may round a tie another way
    notes = list(question.notes)
    if not own:
        kept, first = facts.target[: facts.own], token_labels(tokenizer, [facts.top], before)[0]
        goes = f"begins with {first!r} ({facts.top_probability:.1%})"
        if kept:
            goes = f"goes on otherwise after {decoded(tokenizer, kept, before)!r}"
        notes.append(f"The target is not the model's own answer, which {goes}.")
    if own and facts.target[0] == tokenizer.eos_token_id:
        notes.append("The model ends its text at once: its answer is empty.")
    for rival, (asked, other) in zip(question.rival, facts.rivals, strict=True):
        if other > asked:
            notes.append(
                f"{rival.other_label!r} is nearer to what the model expects than {rival.label!r}: "
                f"the first token of each has a probability of {other:.2g} and {asked:.2g}."
            )
    if facts.rank > BEST:
        notes.append(
            "The target is not among the model's ten best: its first token is "
            f"number {facts.rank:,} of the next tokens."
        )
    # an answer of many tokens is improbable as a whole, even where the model is sure of each
    if facts.probability ** (1 / count if own else 1) < WEAK:
        notes.append(f"The target's probability is under 1 %: {facts.probability:.2g}.")
    found = {name: getattr(facts, name) for name in _TOLD}
    return replace(question, notes=tuple(notes), own=own, **found)


def read_facts(
    logits: torch.Tensor, target: Sequence[int] | None, rivals: Sequence[Rival] = ()
) -> Facts:
    """What logits [tokens of the target, vocab] say of the target, given all before each token.

    An open target is the most likely token of the only row; of equal logits, the lowest id.
    """
    best, tops = logits.max(dim=-1)  # [tokens] each
    whole = logits.logsumexp(dim=-1)  # [tokens]
    ids = tops[:1] if target is None else torch.tensor(list(target), device=logits.device)
    chosen = logits.gather(1, ids[:, None])[:, 0]  # [tokens]

    def first(token):
        return float((logits[0, token] - whole[0]).exp())

    return Facts(
        target=tuple(ids.tolist()),
        probability=float((chosen - whole).sum().exp()),
        top=int(tops[0]),
        top_probability=first(tops[0]),
        lead=float(logits[0].topk(2).values.diff().abs()),
        rank=1 + int((logits[0] > chosen[0]).sum()),
        own=[*(best == chosen).tolist(), False].index(False),
        rivals=tuple((first(some.token), first(some.other)) for some in rivals),
    )


def in_half_precision(model: Any) -> bool:
    """Whether ``model`` computes in bfloat16 or float16."""
    return model.get_input_embeddings().weight.dtype in HALF


@contextlib.contextmanager
def float32_logits(model: Any) -> Iterator[None]:
    """Compute the logits in float32 while inside, from the states that the model itself computes.

    bfloat16 counts in steps of 0.125 from 16 to 32, where a likely token's logit is: the two best
    are often equal there, and which comes first says nothing. In float32 the output layer tells
    them apart. A model in float32 is left as it is, and so is an output layer that is no plain
    matrix in memory. The states come by ``machine.products_in_float32``, as a method's do.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with contextlib.ExitStack() as stack:
        stack.enter_context(products_in_float32(model))
        if type(head) is nn.Linear and in_half_precision(model) and not head.weight.is_meta:

            def again(module, args, out):
                return output_logits(args[0], module.weight, module.bias)

            stack.enter_context(head.register_forward_hook(again))
        yield


def output_logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits [..., vocab] of states [..., dim], by the output layer's matrix; see above.

    A matrix in half precision is widened to float32 in portions, so that it is never held twice.
    """
    if weight.dtype not in HALF:
        return F.linear(states, weight, bias)
    states = states.float()
    logits = torch.cat([F.linear(states, some.float()) for some in weight.split(PORTION)], dim=-1)
    return logits if bias is None else logits + bias.float()


STEERING = (  # settings by which a model may write something else than its most likely token
    "repetition_penalty",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "min_length",
    "min_new_tokens",
    "num_beams",
)


def greedy_answer(model: Any, input_ids: torch.Tensor, most: int, ends: set[int]) -> list[int]:
    """The most likely token, again and again: at most ``most`` ids, the last of ``ends`` included.

    The raw logits decide, in float32. ``model.generate`` would also apply what a checkpoint's own
    settings say about repetition, forced or suppressed tokens and beams, and another answer would
    be explained than the one that the logits give.
    """
    written: list[int] = []
    step, past = input_ids, None
    with torch.inference_mode(), float32_logits(model), progress("answer", most):
        while len(written) < most and not ends & set(written[-1:]):
            output = model(step, past_key_values=past, use_cache=True, logits_to_keep=1)
            advance(1)
            past = getattr(output, "past_key_values", None)
            written.append(int(output.logits[0, -1].float().argmax()))
            step = step.new_tensor([written[-1:]])
            if past is None:
                step = torch.cat([input_ids, step.new_tensor([written])], dim=1)
    return written


def with_answer(model: Any, question: Question, most: int) -> Question:
    """``question`` about the model's own greedy answer of at most ``most`` tokens."""
    ends = {question.tokenizer.eos_token_id}
    for config in (model.config, getattr(model, "generation_config", None)):
        found = getattr(config, "eos_token_id", None)
        ends |= set(found if isinstance(found, list) else [found])
    written = greedy_answer(model, question.input_ids, most, ends - {None})
    question = replace(with_target(question, written), greedy=True)
    steering = [name for name in STEERING if _is_set(model, name)]
    if not steering:
        return question
    told = (
        f"The model's own settings for generation ({', '.join(steering)}) are left out: the answer "
        "is what the raw logits give, greedily."
    )
    return replace(question, notes=(*question.notes, told))


def _is_set(model, name):
    found = getattr(getattr(model, "generation_config", None), name, None)
    nothing = 1 if name in ("repetition_penalty", "num_beams") else 0
    return found not in (None, nothing, [])


def top_tokens(
    model: Any, tokenizer: Any, input_ids: torch.Tensor, k: int = 5
) -> list[tuple[str, float, float]]:
    """The model's ``k`` most likely next tokens after ``input_ids`` [1, seq].

    Returns a list of ``(text, probability, logit)``, the most likely first.

    Introduced in notebooks/03_generation.ipynb.
    """
    with torch.inference_mode():
        logits = model(input_ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    top = logits.topk(k)
    probabilities = logits.softmax(dim=-1)[top.indices]
    texts = [tokenizer.decode([token_id]) for token_id in top.indices]
    return list(zip(texts, probabilities.tolist(), top.values.tolist(), strict=True))


# --- target and foil ---------------------------------------------------------------------------


def _field(role):
    """The key of an entry that names it."""
    return "options" if role == "option" else role


def _named(tokenizer, read, notes, rivals, role, text, ids=None):
    """The ids of what is named by text or by ids, or ``None``; adds to its notes and rivals."""
    bad = partial(InputError, field=_field(role))
    if text is not None and ids is not None:
        raise bad(f"Give the {role} as text or as ids, not both.")
    if ids is not None:
        by = f"{role}_ids"
        if isinstance(ids, str) or not isinstance(ids, Sequence | torch.Tensor) or not len(ids):
            raise InputError(f"{by} must list at least one token id.", field=by)
        ids = [each.item() if torch.is_tensor(each) and not each.dim() else each for each in ids]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
            raise InputError(f"{by} must be whole numbers.", field=by)
        return tuple(ids)
    if text is None:
        return None
    if not isinstance(text, str) or not text:
        by_ids = role in ("target", "foil") and not isinstance(text, str)
        hint = f" Ids go by {role}_ids." if by_ids else ""
        must = "is empty: it must" if text == "" else "must"
        raise bad(f"The {role} {must} be text, such as ' Riga'.{hint}")
    if half_a_pair(text):
        raise bad(f"The {role} has half of a surrogate pair in it.")
    found, merged = continuation(tokenizer, read, text)
    if not found:
        raise bad(f"The {role} {text!r} has no token this model knows.")
    pieces = token_labels(tokenizer, found, read.ids)
    if merged:
        notes.append(
            f"The {role} {text!r} merges with the last token of the prompt when written in one; "
            f"it was read by itself, as {pieces}."
        )
    if not pieces[0].strip() and text.strip():
        notes.append(f"The first token of the {role} {text!r} is blank.")
    other = text[1:] if text.startswith(" ") else f" {text}"
    rival = [] if text.lstrip(" ")[:1].isspace() else continuation(tokenizer, read, other)[0]
    if rival and rival[0] != found[0]:
        rivals.append(Rival(found[0], rival[0], text, other))
    return tuple(found)


def _check_size(tokenizer, read, named, room, context, vocabulary):
    ids = read.ids
    if context is not None and len(ids) + max(0, room - 1) > context:
        behind = f" with {room:,} more behind it" if room > 1 else ""
        raise bad_prompt(
            f"The prompt is {len(ids):,} tokens long{behind} and the model reads at most "
            f"{context:,}: shorten it."
        )
    for number, token in tokenizer.added_tokens_decoder.items():
        if vocabulary is not None and number >= vocabulary and token.content in read.text:
            raise bad_prompt(
                f"The prompt holds {token.content!r}, which was added to the tokenizer and for "
                "which the model has no embedding: resize its embeddings, or take the token out."
            )
    for role, some in [("prompt", ids), *named]:
        for each in some or ():
            if each < 0 or (vocabulary is not None and each >= vocabulary):
                most = f" to {vocabulary - 1:,}" if vocabulary else ""
                raise InputError(
                    f"The {role} holds the token id {each}, for which the model has no embedding: "
                    f"ids go from 0{most}.",
                    field=_field(role),
                )


def _check_tokens(tokenizer, role, ids):
    """A table may have more rows than there are tokens, and a row that is none means nothing."""
    for each in ids if tokenizer.is_fast else ():
        if tokenizer.convert_ids_to_tokens(each) is None:
            raise InputError(
                f"The {role} holds the token id {each}, a row of the embedding table that stands "
                "for no token: name another one, or fetch the model's own tokenizer.",
                field=_field(role),
            )


def _read_option(tokenizer, read, text):
    notes: list[str] = []
    rivals: list[Rival] = []
    ids = _named(tokenizer, read, notes, rivals, "option", text)
    label = decoded(tokenizer, ids, read.ids)
    return Option(ids, label, notes=tuple(notes), rival=tuple(rivals))


def _check_alternatives(options):
    """No option may go on from another one: then the two are no alternatives."""
    for some, longer in itertools.permutations(options, 2):
        if longer.ids[: len(some.ids)] == some.ids:
            raise bad_options(
                f"The options {some.label!r} and {longer.label!r} begin alike and one of them ends "
                "there, so they are no alternatives: write both to the end of a word."
            )


def _answer_units(question, target, before):
    """Units of the answer's own tokens but the last, which nothing was written after."""
    seq, tokenizer = question.input_ids.shape[1], question.tokenizer
    labels = token_labels(tokenizer, target, before)[:-1]
    # all of an answer is one turn, also beside sources
    kind = "turns" if question.grouping == "sources" else question.grouping
    text, spans = spelled_by(tokenizer, target[:-1], before)
    whole, parts = [(0, len(text), "answer")], ["answer"] * len(labels)
    units = prompt_units(Prompt(text, list(target[:-1]), spans, parts, labels, whole), kind)
    return [
        replace(unit, positions=tuple(seq + place for place in unit.positions)) for unit in units
    ]
