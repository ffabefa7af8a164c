"""A prompt as a model reads it: its tokens, where each stands in the text, and whose words it is.

Places are character offsets that the tokenizer reports, never lengths of decoded tokens: a token
may be a part of a character, and a SentencePiece token decodes without its space. The words of a
user are tokenised so that no control token can come of them.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
from icu4py.breakers import SentenceBreaker, WordBreaker
from tokenizers import Tokenizer

from helpers.errors import InputError

ROLES = ("system", "user", "assistant")
PARTS = ("template", *ROLES, "prompt", "answer")
UNITS = ("tokens", "words", "sentences", "turns")
_LOCALE = "en@ss=standard"  # "Mr." ends no sentence; words of other scripts do not depend on it
Span = tuple[int, int]


@dataclass(frozen=True)
class Unit:
    """What gets one score: a token, a word, a sentence, a turn, or a source.

    ``positions`` are those of its tokens in what is read, ``part`` says whose words they are: one
    of ``PARTS``.
    """

    label: str
    positions: tuple[int, ...]
    part: str


@dataclass(frozen=True)
class Prompt:
    """``text`` as ``ids``; token i stands at ``spans[i]``, begin and end in characters.

    ``parts[i]`` is one of ``PARTS``. ``own`` lists the stretches ``(begin, end, part)`` of the
    text that somebody wrote, as opposed to the template. A token that stands for no text, such as
    the beginning-of-text token, has an empty span and belongs to the template.
    """

    text: str
    ids: list[int]
    spans: list[Span]
    parts: list[str]
    labels: list[str]
    own: list[tuple[int, int, str]]


# --- reading -----------------------------------------------------------------------------------


def read_prompt(tokenizer: Any, prompt: str | Sequence[dict], *, chat=False, raw=False) -> Prompt:
    """The tokens of a text, or of a list of messages inside the model's chat template.

    ``chat=True`` takes a text as one message of the user. A control token that is typed in a text
    or a message stays text, unless ``raw=True`` says that the text is a finished template.

    Raises ``InputError`` for an empty text, messages that are no conversation, a template that
    fails or changes the text, and a beginning-of-text token that ``raw`` doubles.

    notebooks/02_tokenization.ipynb and 03_generation.ipynb take it apart.
    """
    if isinstance(prompt, str):
        _check_text(prompt, "prompt", "The prompt")
        if raw and chat:
            raise InputError("raw and chat exclude each other: drop one.", field="raw")
        if not chat:
            return _read(tokenizer, [(prompt, "prompt")], raw)
        prompt = [{"role": "user", "content": prompt}]
    elif raw:
        raise InputError("raw takes a text, not messages: give the finished text.", field="raw")
    return _read(tokenizer, _render(tokenizer, check_messages(prompt)))


def check_messages(messages: Any) -> list[dict[str, str]]:
    """Messages as ``{"role": …, "content": text}``, or an ``InputError`` with the index."""
    if not isinstance(messages, Sequence) or not messages:
        raise InputError(
            "The prompt is neither a text nor a list of messages: write at least one word.",
            field="prompt",
        )
    found = []
    for index, message in enumerate(messages):
        here = f"Message {index}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{here} needs the keys role and content.", field="messages")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(
                f"{here} has the role {str(role)[:40]!r}: use {', '.join(ROLES)}.", field="messages"
            )
        if isinstance(content, list):  # the form in which other interfaces send text
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(f"{here} holds more than text: keep its text.", field="messages")
            content = "".join(texts)
        _check_text(content, "messages", f"The content of message {index}")
        if role == "system" and index:
            raise InputError(
                f"{here} is a {'second ' * (found[0]['role'] == role)}system message: keep one, "
                "as the first message.",
                field="messages",
            )
        if role == "assistant" and not any(some["role"] == "user" for some in found):
            raise InputError(
                f"{here} is the assistant's, and the user has said nothing yet: begin with the "
                "user.",
                field="messages",
            )
        found.append({"role": role, "content": content})
    if found[-1]["role"] == "system":
        raise InputError("The user says nothing: add a message of the user.", field="messages")
    return found


def _check_text(text, field, what):
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{what} is empty: write at least one word.", field=field)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(
            f"{what} has half of a surrogate pair in it: save it as UTF-8 again.", field=field
        )


def _render(tokenizer, messages):
    """Messages in the template, as segments ``(text, part)``."""
    if not tokenizer.chat_template:
        raise InputError(
            "This model has no chat template, so it takes no messages and no chat=True: ask the "
            "raw prompt, or take an instruct model.",
            field="chat",
        )
    texts = [message["content"] for message in messages]
    marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        marked = _applied(tokenizer, messages, [wrap(mark) for mark in marks])
        if all(marked.count(mark) == 1 for mark in marks):
            break
    else:
        bad = next(index for index, mark in enumerate(marks) if marked.count(mark) != 1)
        how = "drops" if marks[bad] not in marked else "repeats"
        raise InputError(
            f"The chat template {how} the text of message {bad}: leave that message out, or ask "
            "the finished text with raw=True.",
            field="messages",
        )
    whole = _applied(tokenizer, messages, [wrap(text) for text in texts])
    order = sorted(range(len(marks)), key=lambda index: marked.index(marks[index]))
    fixed, rest = [], marked
    for index in order:
        before, _, rest = rest.partition(marks[index])
        fixed.append(before)
    fixed.append(rest)
    segments, at = [(fixed[0], "template")], len(fixed[0])
    good = whole.startswith(fixed[0])
    for index, after in zip(order, fixed[1:], strict=True):
        text = texts[index]
        fits = (text, text.strip(), text.lstrip(), text.rstrip())  # templates often trim
        text = next((some for some in fits if whole.startswith(some + after, at)), None)
        if text is None or not good:
            raise InputError(
                f"The chat template changes the text of message {index}, so its words cannot be "
                "found again: ask the finished text with raw=True.",
                field="messages",
            )
        segments += [(text, messages[index]["role"]), (after, "template")]
        at += len(text) + len(after)
    return [(text, part) for text, part in segments if text]


def _applied(tokenizer, messages, contents):
    filled = [
        {"role": message["role"], "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]
    begun = messages[-1]["role"] == "assistant"  # the assistant's beginning is to be continued
    try:
        return tokenizer.apply_chat_template(
            filled, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"The chat template refuses these messages ({said[:200]}): change their roles or order.",
            field="messages",
        ) from error


def _read(tokenizer, segments, raw=False):
    text = "".join(part for part, _ in segments)
    ends, own = 0, []
    for segment, part in segments:
        if part != "template":
            own.append((ends, ends + len(segment), part))
        ends += len(segment)
    plain = [part for _, part in segments] == ["prompt"]
    typed = not raw and any(
        control in text[begin:end] for control in _controls(tokenizer) for begin, end, _ in own
    )
    ids, spans = _encoded(tokenizer, text, plain)
    if typed or (not plain and any(_crosses(text, span, own) for span in spans)):
        ids, spans, at = [], [], 0
        for segment, part in segments:
            read = _plain(tokenizer) if typed and part != "template" else tokenizer
            some, places = _encoded(read, segment, plain)
            ids += some
            spans += [(begin + at, end + at) for begin, end in places]
            at += len(segment)
    if not ids:
        raise InputError(
            f"The prompt {text!r} has no token this model knows: use other text.", field="prompt"
        )
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise InputError(
            f"The prompt begins with {tokenizer.bos_token!r}, which the tokenizer adds as well: "
            "leave it out.",
            field="prompt",
        )
    spans = _with_spaces(text, spans, {begin for begin, _, _ in own})
    parts = [_part_of(text, span, own) for span in spans]
    return Prompt(text, ids, spans, parts, _labels(tokenizer, text, ids, spans), own)


def _encoded(tokenizer, text, special):
    """Token ids of a text and their spans."""
    if isinstance(tokenizer, Tokenizer):
        found = tokenizer.encode(text, add_special_tokens=special)
        return list(found.ids), list(found.offsets)
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        return found["input_ids"], [tuple(span) for span in found["offset_mapping"]]
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids, spans_by_decoding(tokenizer, ids)


def spans_by_decoding(tokenizer: Any, ids: list[int]) -> list[Span]:
    """Spans in the decoded text, for ids that were not read from a text."""
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    lengths = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts]
    return [(begin, max(begin, end)) for begin, end in pairwise(lengths)]


@lru_cache(maxsize=4)
def _controls(tokenizer):
    """Texts of tokens that steer a model: special ones, and those of a template or like ``<|x|>``.

    Other added tokens, such as runs of spaces, are ordinary text.
    """
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip()
        and (
            token.special
            or token.content in str(tokenizer.chat_template or "")
            or (token.content.startswith("<|") and token.content.endswith("|>"))
        )
    }


@lru_cache(maxsize=4)
def _plain(tokenizer):
    """The same tokenizer without its control tokens: what is typed stays text."""
    if not tokenizer.is_fast:
        raise InputError(
            "The text holds a control token of this model, and its tokenizer cannot tell typed "
            "text from it: take the control token out.",
            field="prompt",
        )
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    controls = _controls(tokenizer)
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] not in controls]
    return Tokenizer.from_str(json.dumps(whole))


def _crosses(text, span, own):
    """True for a token that holds characters of two parts, white space aside."""
    parts = {
        _part_of(text, (place, place + 1), own)
        for place in range(*span)
        if not text[place].isspace()
    }
    return len(parts) > 1


def _part_of(text, span, own):
    begin, end = span
    place = next((place for place in range(begin, end) if not text[place].isspace()), begin)
    if begin == end:
        return "template"
    return next((part for first, last, part in own if first <= place < last), "template")


def _with_spaces(text, spans, starts):
    """Spans that begin with the white space before a token, where the tokenizer leaves it out."""
    found, before = [], 0
    for begin, end in spans:
        gap = text[before:begin]
        if begin < end and gap and gap.isspace() and not any(before < s <= begin for s in starts):
            begin = before
        found.append((begin, end))
        before = max(before, end)
    return found


def _labels(tokenizer, text, ids, spans):
    """One readable string for each token; ``你[1/2]`` for a part of a character."""
    labels: list[str] = []
    while (start := len(labels)) < len(ids):
        begin, end = spans[start]
        if begin == end:
            labels.append(tokenizer.decode([ids[start]]) or str(ids[start]))
            continue
        stop = start + 1
        while stop < len(ids) and spans[stop][0] < end and spans[stop][0] < spans[stop][1]:
            end = max(end, spans[stop][1])
            stop += 1
        if stop == start + 1:
            labels.append(text[begin:end])
        else:
            count = stop - start
            labels += [f"{text[begin:end]}[{number}/{count}]" for number in range(1, count + 1)]
    return labels


def token_labels(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """One readable string for each token id, of ids that were not read from a text.

    A byte-level tokenizer may spread one character over several tokens, and no single one of them
    can be decoded alone. Such a run is labelled with the text it spells together and the place of
    each token in it: ``你[1/2]``, ``你[2/2]``.

    Introduced in notebooks/02_tokenization.ipynb.
    """
    labels, start = [], 0
    while start < len(token_ids):
        for end in range(start + 1, min(start + 8, len(token_ids)) + 1):
            run = token_ids[start:end]
            text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
            broken = "\N{REPLACEMENT CHARACTER}" in text  # off inside a character
            if not broken or tokenizer(text, add_special_tokens=False)["input_ids"] == run:
                break  # the second case: the prompt itself holds a U+FFFD
        else:  # part of no whole character: named as the tokenizer names its bytes
            run = token_ids[start : start + 1]
            (text,) = tokenizer.convert_ids_to_tokens(run)
        of = f"/{len(run)}]"
        labels += [f"{text}[{i}{of}" if len(run) > 1 else text for i in range(1, len(run) + 1)]
        start += len(run)
    return labels


def continuation(tokenizer: Any, prompt: Prompt, text: str) -> tuple[list[int], bool]:
    """The ids of ``text`` as it goes on after ``prompt``, and whether the two merge.

    Where the last token of the prompt would be another one with ``text`` behind it, ``text`` is
    tokenised by itself and the second value is true.
    """
    tail = prompt.text[prompt.spans[-8][0] if len(prompt.ids) > 8 else 0 :]
    before, _ = _encoded(tokenizer, tail, False)
    both, _ = _encoded(tokenizer, tail + text, False)
    if both[: len(before)] == before:
        return both[len(before) :], False
    return _encoded(tokenizer, text, False)[0], True


# --- places and units --------------------------------------------------------------------------


def _segments(breaker, text, begin, end):
    """Spans of what ICU takes for words or sentences in a stretch of the text."""
    spans, at = [], begin
    for piece in breaker(text[begin:end], _LOCALE):
        spans.append((at, at + len(piece)))
        at += len(piece)
    return spans


def word_places(prompt: Prompt, words: str) -> list[list[int]]:
    """The positions of the tokens of each occurrence of ``words`` in what was written.

    Only whole words count, in any script, and the template's own text does not. Empty if there is
    none.
    """
    words, places = words.strip(), []
    for begin, end, _ in prompt.own if words else ():
        edges = {edge for span in _segments(WordBreaker, prompt.text, begin, end) for edge in span}
        at = prompt.text.find(words, begin, end)
        while at >= 0:
            if at in edges and at + len(words) in edges:
                places.append(_tokens_in(prompt, at, at + len(words)))
            at = prompt.text.find(words, at + 1, end)
    return places


def _tokens_in(prompt, begin, end):
    """The tokens of which a character other than white space stands between two places."""
    return [
        position
        for position, (first, last) in enumerate(prompt.spans)
        if prompt.text[max(first, begin) : min(last, end)].strip()
    ]


def prompt_units(
    prompt: Prompt, how: str = "tokens", sources: Sequence[str] | None = None
) -> list[Unit]:
    """The units of a prompt: every token is in one, and the template is apart.

    ``how`` is one of ``UNITS``. With ``sources``, texts that stand in the prompt once each, the
    units are these and the sentences around them. For sentences, turns and sources the template is
    one unit.

    Raises ``InputError`` for an unknown kind, and for a source that is absent, there twice, or
    overlaps another one.
    """
    if how not in UNITS:
        raise InputError(f"There are no units {how!r}: use {', '.join(UNITS)}.", field="units")
    if sources is not None:
        stretches = _source_stretches(prompt, sources)
    elif how == "tokens":
        return [
            Unit(label, (position,), part)
            for position, (label, part) in enumerate(zip(prompt.labels, prompt.parts, strict=True))
        ]
    elif how == "turns":
        stretches = [(begin, end) for begin, end, _ in prompt.own]
    else:
        breaker = {"words": WordBreaker, "sentences": SentenceBreaker}[how]
        stretches = [
            span
            for begin, end, _ in prompt.own
            for span in _segments(breaker, prompt.text, begin, end)
        ]
    fine, begins = how == "words" and sources is None, [begin for begin, _ in stretches]
    groups: dict[Any, list[int]] = {}
    for position, part in enumerate(prompt.parts):
        key: Any = ("template", position if fine else 0)
        if part != "template":
            key = bisect_right(begins, _place(prompt, position, fine))
        groups.setdefault(key, []).append(position)
    return [_unit(prompt, positions) for positions in groups.values()]


def _place(prompt, position, fine):
    """The character that decides to which stretch a token belongs."""
    begin, end = prompt.spans[position]
    text = prompt.text[begin:end]
    if text.strip():
        return begin + len(text) - len(text.lstrip())
    last = next((end for first, end, _ in prompt.own if first <= begin < end), begin)
    # the space that SentencePiece or a byte-level tokenizer sets before a word belongs to the word
    return end if fine and not text.strip(" ") and end < last else begin


def _unit(prompt, positions):
    part = prompt.parts[positions[0]]
    spans = [prompt.spans[position] for position in positions]
    text = prompt.text[min(begin for begin, _ in spans) : max(end for _, end in spans)]
    label = prompt.labels[positions[0]] if len(positions) == 1 else text
    if part == "template" and len(positions) > 1:
        label = "template"
    return Unit(label, tuple(positions), part)


def _source_stretches(prompt, sources):
    found = []
    for index, source in enumerate(sources):
        if not isinstance(source, str) or not source.strip():
            raise InputError(f"Source {index} is empty: write its text.", field="sources")
        source = source.strip()
        places = [
            place
            for begin, end, _ in prompt.own
            for place in range(begin, end - len(source) + 1)
            if prompt.text.startswith(source, place)
        ]
        if len(places) != 1:
            how = "does not stand" if not places else f"stands {len(places)} times"
            raise InputError(
                f"Source {index}, {source[:40]!r}, {how} in the prompt: give text that stands "
                "there once.",
                field="sources",
            )
        found.append((places[0], places[0] + len(source), index))
    found.sort()
    for (_, end, index), (begin, _, other) in pairwise(found):
        if begin < end:
            raise InputError(
                f"Sources {index} and {other} overlap in the prompt: give each stretch once.",
                field="sources",
            )
    stretches: list[Span] = []
    for begin, end, _ in prompt.own:
        at = begin
        for first, last, _ in [some for some in found if begin <= some[0] < end]:
            stretches += _segments(SentenceBreaker, prompt.text, at, first)
            stretches.append((first, last))
            at = last
        stretches += _segments(SentenceBreaker, prompt.text, at, end)
    return stretches
