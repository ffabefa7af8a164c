"""A prompt as a model reads it: its tokens, where each stands in the text, and whose words it is.

Places are character offsets that the tokenizer reports, never lengths of decoded tokens: a token
may be a part of a character, and a SentencePiece token decodes without its space. The words of a
user are tokenised so that no control token can come of them.
"""

import contextlib
import ctypes
import json
import re
import secrets
import threading
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from typing import Any

from icu4py.breakers import CharacterBreaker, SentenceBreaker, WordBreaker
from tokenizers import AddedToken, Tokenizer

from helpers.errors import InputError

ROLES = ("system", "user", "assistant")
PARTS = ("template", *ROLES, "prompt", "answer")
UNITS = ("tokens", "words", "sentences", "turns")
FINE = UNITS[:2]  # so small that one replaced leaves a text; their template is not one unit
_BREAKERS = {"words": WordBreaker, "sentences": SentenceBreaker}
_LOCALE = "en@ss=standard"  # "Mr." ends no sentence; words of other scripts do not depend on it
_TRUSTED = ("template", "answer")  # parts in which a control token is one
SECONDS = 10  # that a template may take
MOST_OPTIONS = 20  # texts that a question compares
LONGEST = 10_000_000  # characters that a template may make: more than any model reads
SHOWN = 2000  # characters of a label that people are shown
Span = tuple[int, int]
half_a_pair = re.compile(r"[\ud800-\udfff]").search  # of surrogates: no text can hold one
# what is wrong with each part of a question that is read here
bad_prompt = partial(InputError, field="prompt")
bad_messages = partial(InputError, field="messages")
bad_sources = partial(InputError, field="sources")
bad_options = partial(InputError, field="options")


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
    the beginning-of-text token, has an empty span and belongs to the template. ``typed`` are
    control tokens that somebody wrote and that were read as text. What goes on after the prompt is
    read with its ``tail``: pieces of its text, each with its part, which make the ``tail_ids``.
    """

    text: str
    ids: list[int]
    spans: list[Span]
    parts: list[str]
    labels: list[str]
    own: list[tuple[int, int, str]]
    typed: tuple[str, ...] = ()
    tail: Sequence[tuple[str, str]] = ()
    tail_ids: Sequence[int] = ()


# --- reading -----------------------------------------------------------------------------------


def read_prompt(
    tokenizer: Any, prompt: str | Sequence[dict], *, chat: bool = False, raw: bool = False
) -> Prompt:
    """The tokens of a text, or of a list of messages inside the model's chat template.

    ``chat=True`` takes a text as one message of the user. A control token that is typed in a text
    or a message stays text, unless ``raw=True`` says that the text is a finished template.

    Raises ``InputError`` for an empty text, messages that are no conversation, a template that
    fails or changes the text, and a beginning-of-text token that ``raw`` doubles.

    notebooks/02_tokenization.ipynb and 03_generation.ipynb take it apart.
    """
    if isinstance(prompt, str):
        check_text(prompt, "prompt", "The prompt")
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
        raise bad_prompt(
            "The prompt is neither a text nor a list of messages: write at least one word."
        )
    found: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        here = f"Message {index}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise bad_messages(f"{here} needs the keys role and content.")
        role, content = message["role"], message["content"]
        for key in ("tool_calls", "function_call"):
            if message.get(key):
                raise bad_messages(f"{here} has {key}: only text can be read.")
        if role not in ROLES:
            raise bad_messages(f"{here} has the role {str(role)[:40]!r}: use {', '.join(ROLES)}.")
        if isinstance(content, list | tuple):  # the form in which other interfaces send text
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise bad_messages(f"{here} holds more than text: keep its text.")
            content = "".join(map(str, texts))
        check_text(content, "messages", f"The content of message {index}")
        if role == "system" and index:
            nth = "second " * (found[0]["role"] == role)
            raise bad_messages(f"{here} is a {nth}system message: keep one, as the first message.")
        if role == "assistant" and not any(some["role"] == "user" for some in found):
            raise bad_messages(
                f"{here} is the assistant's, and the user has said nothing yet: begin with the "
                "user."
            )
        found.append({"role": role, "content": content})
    if found[-1]["role"] == "system":
        raise bad_messages("The user says nothing: add a message of the user.")
    return found


def read_options(
    options: Sequence[str], target: Any = None, foil: Any = None, answer: Any = None
) -> tuple[str | None, str | None, list[str]]:
    """``(target, foil, options)`` of some texts that are compared, or an ``InputError``.

    Two are target and foil: the first, or the one that ``target`` repeats, is the target, and none
    are left. Of more, which is the foil, and the target where none is named, is for the model to
    say: see ``helpers.questions.with_likeliest``.
    """
    if foil is not None or answer:
        other = "an answer" if foil is None else "a foil"
        raise bad_options(f"It has options and {other}: keep one of them.")
    texts = not isinstance(options, str) and isinstance(options, Sequence)
    if not texts or not all(isinstance(option, str) for option in options):
        raise bad_options(
            "The options are no list of texts: write one, such as [' Riga', ' Rome']."
        )
    if len(options) < 2:
        raise bad_options("Options are compared with each other: give at least two.")
    if len(options) > MOST_OPTIONS:
        raise bad_options(f"There are {len(options):,} options: give at most {MOST_OPTIONS}.")
    twice = [option for at, option in enumerate(options) if option in options[:at]]
    if twice:
        raise bad_options(f"The option {twice[0][:80]!r} is there twice: remove one.")
    if target is not None and target not in options:
        raise bad_options(f"The target {target!r} is none of the options: choose one.")
    if len(options) > 2:
        return target, None, list(options)
    target = options[0] if target is None else target
    return target, options[options[0] == target], []


def check_text(text: object, field: str, what: str) -> None:
    """Raise ``InputError`` for what is no text of at least one word, or cannot be UTF-8."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{what} is empty: write at least one word.", field=field)
    if half_a_pair(text):
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
    marked = [{**each, "content": f"\ue000{index}\ue001"} for index, each in enumerate(messages)]
    problem = None
    for wrap in (str, lambda text: [{"type": "text", "text": text}]):
        try:
            # what the template sets before, between and behind the messages, and their numbers
            fixed = re.split("\ue000([0-9]+)\ue001", _applied(tokenizer, marked, wrap))
            whole = _applied(tokenizer, messages, wrap)
            for index in map(str, range(len(messages))):
                if (count := fixed[1::2].count(index)) != 1:
                    raise bad_messages(
                        f"The chat template {'repeats' if count else 'drops'} the text of message "
                        f"{index}: leave that message out, or ask the finished text with raw=True."
                    )
            break
        except InputError as error:
            problem = problem or error
    else:
        raise problem
    segments, at = [(fixed[0], "template")], len(fixed[0])
    for index, after in zip(map(int, fixed[1::2]), fixed[2::2], strict=True):
        text = messages[index]["content"]
        # templates often trim; the longest that fits, as what they trim may be a part of it
        for some in (text, text.lstrip(), text.rstrip(), text.strip()):
            if whole.startswith(fixed[0]) and whole.startswith(some + after, at):
                break
        else:
            raise bad_messages(
                f"The chat template changes the text of message {index}, so its words cannot be "
                "found again: ask the finished text with raw=True."
            )
        segments += [(some, messages[index]["role"]), (after, "template")]
        at += len(some) + len(after)
    if at != len(whole):
        raise bad_messages(
            "The chat template adds text that depends on what the messages say, so their words "
            "cannot be told from it: ask the finished text with raw=True."
        )
    return [(text, part) for text, part in segments if text]


def _applied(tokenizer, messages, wrap):
    filled = [{**message, "content": wrap(message["content"])} for message in messages]
    begun = messages[-1]["role"] == "assistant"  # the assistant's beginning is to be continued
    try:
        with _at_most(SECONDS):
            text = tokenizer.apply_chat_template(
                filled,
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
    except TimeoutError:
        raise bad_messages(
            f"The chat template took more than {SECONDS} seconds over these messages, so it may "
            "never end: ask the finished text with raw=True."
        ) from None
    except MemoryError:
        text = None
    except Exception as error:  # a template is a program of somebody else's
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise bad_messages(
            f"The chat template refuses these messages ({said[:200]}): change roles or order."
        ) from error
    if text is None or len(text) > LONGEST:
        raise bad_messages(
            f"The chat template makes more than {LONGEST:,} characters of these messages, which no "
            "model reads: ask the finished text with raw=True."
        )
    return text


@contextlib.contextmanager
def _at_most(seconds):
    """Raise ``TimeoutError`` inside when the time is over, in whatever thread this is.

    A template is run as Python code, which a signal could end in the main thread only.
    """
    thread, lock, over = ctypes.c_ulong(threading.get_ident()), threading.Lock(), False

    def end():
        with lock:  # so that no error arrives after the end
            if not over:
                error = ctypes.py_object(TimeoutError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over = True
        timer.cancel()


def _read(tokenizer, segments, raw=False):
    text, plain = "".join(segment for segment, _ in segments), segments[0][1] == "prompt"
    owners = [part for segment, part in segments for _ in segment]  # of each character
    stretches = zip(_spans(segment for segment, _ in segments), segments, strict=True)
    own = [(*span, part) for span, (_, part) in stretches if part != "template"]
    if raw:
        segments = [(text, "template")]
    ids, spans, typed = _tokens(tokenizer, segments)
    tail = _tail(tokenizer, segments, text, ids, spans)
    if not plain and any(len(set(_owners(text, owners, span))) > 1 for span in spans):
        ids, spans, typed = _tokens(tokenizer, segments, split=True)
    if not ids:
        raise bad_prompt(f"The prompt {text[:40]!r} has no token this model knows: use other text.")
    if plain:
        first = _beginning(tokenizer)
        ids, spans = [*first, *ids], [(0, 0)] * len(first) + spans
    if ids[:2] == [tokenizer.bos_token_id] * 2:
        raise bad_prompt(
            f"The prompt begins with {tokenizer.bos_token!r}, which the tokenizer adds as well: "
            "leave it out."
        )
    spans = _with_spaces(text, spans, {begin for begin, _, _ in own})
    parts = [_owners(text, owners, span)[0] for span in spans]
    labels = _numbered(_stretches(tokenizer, text, ids, spans))
    return Prompt(text, ids, spans, parts, labels, own, typed, *tail)


def _tail(tokenizer, segments, text, ids, spans):
    """Segments and ids from the last control token on, which nothing before it can change."""
    added = tokenizer.added_tokens_decoder.items() if tokenizer.is_fast else ()
    # the others may be a piece of a word, or of what a normaliser makes of the text
    apart = {i: each.content for i, each in added if not (each.normalized or each.single_word)}
    first, at, tail = 0, 0, []
    for place, (number, span) in enumerate(zip(ids, spans, strict=True)):
        if apart.get(number) == text[slice(*span)]:
            first, at = place, span[0]
    for segment, part in segments:
        tail.append((segment[max(0, at) :], part))
        at -= len(segment)
    return tail, ids[first:]


def _spans(pieces, begin=0):
    """The span of each of some texts that stand one behind the other."""
    return list(pairwise(accumulate(map(len, pieces), initial=begin)))


def _owners(text, owners, span):
    """Whose the characters of a token are; white space counts where there is nothing else."""
    inside = range(*span)
    ink = [place for place in inside if not text[place].isspace()] or inside[:1]
    return [owners[place] for place in ink] or ["template"]


def _tokens(tokenizer, segments, split=False):
    """``(ids, spans, typed)`` of segments, which are read in one piece unless ``split``.

    ``typed`` are the control tokens that were read as text, as they do not stand in the template
    or in an answer.
    """
    text, controls = "".join(segment for segment, _ in segments), _controls(tokenizer)
    trusted = _MARK[0].join(segment for segment, part in segments if part in _TRUSTED)
    typed = tuple(each for each in controls if text.count(each) > trusted.count(each))
    if not typed and not split and not _trims(tokenizer):
        return *_encoded(tokenizer, text), typed
    if not tokenizer.is_fast:
        raise bad_prompt(
            f"The text holds {(typed or ('a piece of the template',))[0]!r}, and this model's "
            "tokenizer cannot tell typed text from a control token: take it out."
        )
    marked = controls if typed else ()
    find = re.compile("|".join(map(re.escape, sorted(marked, key=len, reverse=True))) or "(?!)")
    pieces = [
        find.sub(rf"{_MARK}\g<0>", segment) if part in _TRUSTED else segment
        for segment, part in segments
    ]
    reader = _reader(tokenizer, marked)
    read = reader.encode((_MARK if split else "").join(pieces), add_special_tokens=False)
    tokens = [reader.id_to_token(number) for number in read.ids]
    if escaped := set(tokens) & set(marked):  # a vocabulary may spell it by other ways
        raise bad_prompt(
            f"The text holds {min(escaped)!r}, which this model's tokenizer always takes for a "
            "control token: take it out."
        )
    ids, spans, shift = [], [], 0  # by how many characters of marks a place is too large
    for token, (begin, end) in zip(tokens, read.offsets, strict=True):
        begin -= shift
        shift += len(_MARK) * token.startswith(_MARK)
        if token != _MARK:
            ids.append(tokenizer.backend_tokenizer.token_to_id(token.removeprefix(_MARK)))
            spans.append((begin, end - shift))
    return ids, spans, typed


def _encoded(tokenizer, text):
    """Token ids of a text, without what a tokenizer adds around it, and their spans."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = found["input_ids"]
    if tokenizer.is_fast:
        return ids, found["offset_mapping"]
    spelled, spans = spelled_by(tokenizer, ids)
    if spelled != text:
        raise bad_prompt(
            "This model's tokenizer does not tell where its tokens stand in the text: take its "
            "fast tokenizer, a tokenizer.json."
        )
    return ids, spans


def _beginning(tokenizer):
    """The ids that a tokenizer sets before every text; what it sets behind would end the text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    return full[: next((at for at in starts if full[at : at + len(bare)] == bare), 0)]


def _controls(tokenizer):
    """Texts of tokens that steer a model: special ones, those of a template, ``<x>`` and ``[x]``.

    Other added tokens, such as runs of spaces and words, are ordinary text.
    """
    template, added = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder.values()
    special = {token.content: token.special for token in added if token.content.strip()}
    bracketed = re.compile(r"<.*>|\[.*\]", re.DOTALL).fullmatch
    return tuple(each for each in special if special[each] or each in template or bracketed(each))


def _trims(tokenizer):
    """True for a tokenizer that leaves spaces out of its offsets, which hides where they stand."""
    behind = tokenizer.backend_tokenizer.post_processor if tokenizer.is_fast else None
    return behind is not None and b'"trim_offsets":true' in behind.__getstate__()


_MARK = f"\ue000{secrets.token_hex(8)}"  # nobody can type it


@lru_cache(maxsize=4)
def _reader(tokenizer, marked):
    """The same tokenizer, to which a control token is one only behind ``_MARK``.

    Its ids are others, but each token has the name that it has in ``tokenizer``.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    # a post-processor adds tokens and takes spaces out of the offsets
    whole |= {"post_processor": None, "truncation": None, "padding": None}
    for token in whole["added_tokens"]:
        if token["content"] in marked:
            token.update(content=_MARK + token["content"], normalized=False, single_word=False)
    reader = Tokenizer.from_str(json.dumps(whole))
    reader.add_special_tokens([AddedToken(_MARK, normalized=False)])
    return reader


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


def _stretches(tokenizer, text, ids, spans):
    """``(text, count)`` of the shortest runs of tokens that share no character with others."""
    start = 0
    while start < len(ids):
        (begin, end), stop = spans[start], start + 1
        while begin < end and stop < len(ids) and spans[stop][0] < min(end, spans[stop][1]):
            end = max(end, spans[stop][1])
            stop += 1
        label = text[begin:end] or tokenizer.decode([ids[start]]) or str(ids[start])
        yield label, stop - start
        start = stop


def _numbered(runs):
    """One label a token of runs ``(text, count)``; ``你[1/2]`` where several share a text."""
    return [
        f"{text}[{number}/{count}]" if count > 1 else text
        for text, count in runs
        for number in range(1, count + 1)
    ]


def decoded(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> str:
    """The text of ``ids`` as they go on after the ids ``before``.

    A SentencePiece tokenizer takes the first space out of what it decodes.
    """
    known = list(before)[-4:]
    begun = tokenizer.decode(known, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*known, *ids], clean_up_tokenization_spaces=False)
    if begun and whole.startswith(begun):
        return whole[len(begun) :]
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _runs(tokenizer, ids, before=()) -> Iterator[tuple[str, int]]:
    """``(text, count)`` of the shortest runs of ids that can be decoded by themselves."""
    ids, start, known = list(ids), 0, list(before)
    while start < len(ids):
        for end in range(start + 1, min(start + 8, len(ids)) + 1):
            run = ids[start:end]
            text = decoded(tokenizer, run, known)
            broken = "\N{REPLACEMENT CHARACTER}" in text  # off inside a character
            if not broken or tokenizer(text, add_special_tokens=False)["input_ids"] == run:
                break  # the second case: the prompt itself holds a U+FFFD
        else:  # part of no whole character: named as the tokenizer names its bytes
            run = ids[start : start + 1]
            (text,) = tokenizer.convert_ids_to_tokens(run)
        yield text, len(run)
        start, known = start + len(run), run


def token_labels(tokenizer: Any, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """One readable string for each token id, of ids that were not read from a text.

    A byte-level tokenizer may spread one character over several tokens, and no single one of them
    can be decoded alone. Such a run is labelled with the text it spells together and the place of
    each token in it: ``你[1/2]``, ``你[2/2]``. ``before`` are the ids after which these stand.

    notebooks/02_tokenization.ipynb takes it apart.
    """
    return _numbered(_runs(tokenizer, token_ids, before))


def spelled_by(
    tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()
) -> tuple[str, list[Span]]:
    """The text that ids spell after the ids ``before``, and the span of each in this text."""
    runs = list(_runs(tokenizer, ids, before))
    text = "".join(piece for piece, _ in runs)
    places = zip(_spans(piece for piece, _ in runs), runs, strict=True)
    return text, [span for span, (_, count) in places for _ in range(count)]


def continuation(tokenizer: Any, prompt: Prompt, text: str) -> tuple[list[int], bool]:
    """The ids of ``text`` as it goes on after ``prompt``, and whether the two merge.

    Where the last token of the prompt would be another one with ``text`` behind it, the ids are
    those of ``text`` behind something that it does not merge with, and the second value is true.
    """
    before, (both, _, _) = prompt.tail_ids, _tokens(tokenizer, [*prompt.tail, (text, "answer")])
    if both[: len(before)] == before:
        return both[len(before) :], False
    for other in "\n.a":  # text alone would get the space that SentencePiece sets before a text
        before, both = (_encoded(tokenizer, some)[0] for some in (other, other + text))
        if both[: len(before)] == before:
            return both[len(before) :], True
    return _encoded(tokenizer, text)[0], True


def shortened(text: str, most: int = SHOWN) -> str:
    """``text``, or its first ``most`` characters and how many more there are."""
    if len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text) - most:,} more characters)"


# --- places and units --------------------------------------------------------------------------


def _segments(breaker, text, begin, end):
    """Spans of what ICU takes for characters, words or sentences in a stretch of the text."""
    return _spans(breaker(text[begin:end], _LOCALE), begin)


def _written(breaker, prompt):
    """The same in all that was written, as opposed to the template."""
    return [
        span for begin, end, _ in prompt.own for span in _segments(breaker, prompt.text, begin, end)
    ]


def word_places(prompt: Prompt, words: str) -> list[list[int]]:
    """The positions of the tokens of each occurrence of ``words`` in what was written.

    Only whole words count, in any script, and the template's own text does not. Where a script sets
    no space between words, a dictionary may not know the words: there, any characters that stand
    together are found if there is no other place. Empty if there is none.
    """
    whole, loose, text = [], [], prompt.text
    edges = {edge for span in _written(WordBreaker, prompt) for edge in span}
    for begin, end in _found(prompt, words.strip()):
        if begin in edges and end in edges:
            whole.append((begin, end))
        elif (begin in edges or _joined_up(text, begin)) and (
            end in edges or _joined_up(text, end, "HANGUL")
        ):
            loose.append((begin, end))
    return [_tokens_in(prompt, *place) for place in whole or loose]


def _found(prompt, words):
    """Each place of ``words`` in what was written, however either composes its characters."""
    if not words or half_a_pair(words):
        return []
    wanted, found = [_composed(each) for each in CharacterBreaker(words, _LOCALE)], []
    for first, last, _ in prompt.own:
        spans = _segments(CharacterBreaker, prompt.text, first, last)
        pieces = [_composed(prompt.text[begin:end]) for begin, end in spans]
        for at in range(len(pieces) - len(wanted) + 1):
            if pieces[at : at + len(wanted)] == wanted:
                found.append((spans[at][0], spans[at + len(wanted) - 1][1]))
    return found


def _composed(text):
    return unicodedata.normalize("NFC", text).replace("\r\n", "\n")


_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


def _joined_up(text, place, *others):
    """True between two letters of a script that sets no space between its words."""
    names = [unicodedata.name(character, "") for character in text[place - 1 : place + 1]]
    return all(name.startswith((*_UNSPACED, *others)) for name in names)


def _tokens_in(prompt, begin, end):
    """The tokens of which a character other than white space stands between two places."""
    first = bisect_right(prompt.spans, begin, key=lambda span: span[1])
    last = bisect_left(prompt.spans, end, key=lambda span: span[0])
    places = ((max(a, begin), min(b, end)) for a, b in prompt.spans[first:last])
    return [first + i for i, (a, b) in enumerate(places) if prompt.text[a:b].strip()]


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
        how, stretches = "sources", _source_stretches(prompt, sources)
    elif how in _BREAKERS:
        stretches = _written(_BREAKERS[how], prompt)
    else:
        stretches = prompt.own
    fine, begins = how in FINE, [stretch[0] for stretch in stretches]
    groups: dict[Any, list[int]] = {}
    for position, part in enumerate(prompt.parts):
        key: Any = ("alone", position) if fine else "template"
        if part != "template" and how != "tokens":
            key = bisect_right(begins, _place(prompt, position, fine))
        groups.setdefault(key, []).append(position)
    return [_unit(prompt, positions) for positions in groups.values()]


def joined_units(prompt: Prompt, units: Sequence[Unit], most: int) -> list[Unit]:
    """Neighbours of one part joined, so that about ``most`` units are left of all that was written.

    A unit that is longer than its share stays as it is.
    """
    written = [unit for unit in units if unit.part != "template"]
    room = sum(len(unit.positions) for unit in written) / most
    found: list[Unit] = []
    for unit in units:
        last = found[-1] if found else None
        if (
            last is not None
            and last.part == unit.part != "template"
            and last.positions[-1] + 1 == unit.positions[0]
            and len(last.positions) + len(unit.positions) <= room
        ):
            found[-1] = _unit(prompt, [*last.positions, *unit.positions])
        else:
            found.append(unit)
    return found


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
    part, label = prompt.parts[positions[0]], prompt.labels[positions[0]]
    if len(positions) > 1:
        begins, ends = zip(*(prompt.spans[position] for position in positions), strict=True)
        label = "template" if part == "template" else prompt.text[min(begins) : max(ends)]
    return Unit(label, tuple(positions), part)


def _source_stretches(prompt, sources):
    if isinstance(sources, str) or not sources:
        raise bad_sources("sources must be a list of passages of the prompt.")
    own = [position for position, part in enumerate(prompt.parts) if part != "template"]
    begins, found = [_place(prompt, position, False) for position in own], []
    for index, source in enumerate(sources):
        if not isinstance(source, str) or not source.strip():
            raise bad_sources(f"Source {index} is empty: write its text.")
        source = source.strip()
        places, here = _found(prompt, source), f"Source {index}, {source[:40]!r},"
        if len(places) != 1:
            how = f"stands {len(places)} times" if places else "does not stand"
            raise bad_sources(f"{here} {how} in the prompt: give text that stands there once.")
        ((first, last),) = places
        if not any(first <= begin < last for begin in begins):
            raise bad_sources(f"{here} is a part of one token: give whole words.")
        found.append((first, last, index))
    found.sort()
    for (_, end, index), (begin, _, other) in pairwise(found):
        if begin < end:
            raise bad_sources(
                f"Sources {index} and {other} overlap in the prompt: give each stretch once."
            )
    stretches = []
    for at, end, _ in prompt.own:
        inside = [(first, last) for first, last, _ in found if at <= first < end]
        for first, last in [*inside, (end, end)]:
            stretches += [*_segments(SentenceBreaker, prompt.text, at, first), (first, last)]
            at = end - len(prompt.text[last:end].lstrip())
    # what only separates two sources belongs to the one before
    return [(begin, end) for begin, end in stretches if prompt.text[begin:end].strip()]
