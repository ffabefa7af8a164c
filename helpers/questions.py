"""One question, fixed once, that every attribution method then answers.

A question is a prompt in token ids, the token whose logit is to be explained (the target) and,
if wanted, the token it is compared with (the foil).
"""

from dataclasses import dataclass, replace

import torch

from helpers.errors import InputError


@dataclass(frozen=True)
class Question:
    """A prompt, and the prediction about it that is to be explained.

    ``input_ids`` is a LongTensor [1, seq] on the model's device; ``labels`` holds seq readable
    strings; ``target`` and ``foil`` are token ids (``foil`` may be ``None``), and
    ``target_label`` and ``foil_label`` the same as text.
    """

    prompt: str
    input_ids: torch.Tensor
    labels: list[str]
    target: int
    foil: int | None
    target_label: str
    foil_label: str | None

    def __str__(self):
        """Why " Riga"?, or why " Riga" rather than " Tallinn"?"""
        rather = "" if self.foil is None else f" rather than {self.foil_label!r}"
        return f"why {self.target_label!r}{rather}?"


def ask(model, tokenizer, prompt, *, target=None, foil=None, chat=False):
    """Fix a question: why does ``prompt`` lead to ``target`` (rather than to ``foil``)?

    ``target`` is text that is exactly one token (mind its leading space: ``" Rig"``), a token id,
    or ``None`` for the model's own most likely next token. ``foil`` likewise, ``None`` for no
    comparison. ``chat=True`` puts the prompt through the model's chat template, as one user turn.

    Raises ``InputError`` for an empty prompt, one longer than the model's context, a target or
    foil that is not one token, or a foil equal to the target.

    notebooks/03_generation.ipynb takes it apart.
    """
    question = read_question(model, tokenizer, prompt, target=target, foil=foil, chat=chat)
    if question.target is not None:
        return question
    with torch.inference_mode():
        logits = model(question.input_ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return with_target(tokenizer, question, logits.argmax().item())


def read_question(model, tokenizer, prompt, *, target=None, foil=None, chat=False):
    """What ``ask`` can say before the model is run: without a ``target``, it is left ``None``."""
    input_ids, target, foil = check_question(
        tokenizer,
        prompt,
        target=target,
        foil=foil,
        chat=chat,
        context=model.config.max_position_embeddings,
    )
    return Question(
        prompt=prompt,
        input_ids=torch.tensor([input_ids], device=model.get_input_embeddings().weight.device),
        labels=token_labels(tokenizer, input_ids),
        target=target,
        foil=foil,
        target_label=None if target is None else tokenizer.decode([target]),
        foil_label=None if foil is None else tokenizer.decode([foil]),
    )


def with_target(tokenizer, question, target):
    """``question`` about the token id ``target``; ``InputError`` if that is its foil."""
    _refuse_same(tokenizer, target, question.foil)
    return replace(question, target=target, target_label=tokenizer.decode([target]))


def check_question(tokenizer, prompt, *, target=None, foil=None, chat=False, context=None):
    """``(input_ids, target, foil)`` as lists and ids, or ``InputError``: all that needs no model.

    ``context`` is the most tokens the model can read. A ``target`` of ``None`` stays ``None``.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("The prompt is empty: write at least one word.", field="prompt")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(
            "The prompt has half of a surrogate pair in it: save it as UTF-8 again.", field="prompt"
        )
    input_ids = encode(tokenizer, prompt, chat=chat)
    if not input_ids:
        raise InputError(
            f"The prompt {prompt!r} has no token this model knows: use other text.", field="prompt"
        )
    if context is not None and len(input_ids) > context:
        raise InputError(
            f"The prompt is {len(input_ids):,} tokens long and the model reads at most "
            f"{context:,}: shorten it.",
            field="prompt",
        )
    target = _one_token(tokenizer, target, "target")
    foil = _one_token(tokenizer, foil, "foil")
    if target is not None:
        _refuse_same(tokenizer, target, foil)
    return input_ids, target, foil


def encode(tokenizer, prompt, *, chat=False):
    """The token ids of ``prompt``, as a list; inside the chat template if ``chat``.

    The template writes its own special tokens, so the tokenizer must not add a second set.
    """
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise InputError(
            "This model has no chat template, so chat=True cannot be used: ask the raw prompt, or "
            "take an instruct model.",
            field="chat",
        )
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def top_tokens(model, tokenizer, input_ids, k=5):
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


def token_labels(tokenizer, token_ids):
    """One readable string for each token id.

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


def _one_token(tokenizer, text, role):
    """The id of ``text``, which has to be exactly one token."""
    if text is None:
        return None
    if isinstance(text, int) and not isinstance(text, bool):
        if not 0 <= text < len(tokenizer):
            raise InputError(
                f"The {role} {text} is not a token id: it must be from 0 to {len(tokenizer) - 1}.",
                field=role,
            )
        return text
    if not isinstance(text, str) or not text:
        raise InputError(f"The {role} must be the text of one token, such as ' Rig'.", field=role)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        return ids[0]
    pieces = token_labels(tokenizer, ids)
    raise InputError(
        f"The {role} {text!r} is {len(ids)} tokens, {pieces}, and one is needed: use its first, "
        f"{pieces[0]!r}.",
        field=role,
    )


def _refuse_same(tokenizer, target, foil):
    if target == foil:
        raise InputError(
            f"The foil {tokenizer.decode([foil])!r} is the target itself, so there is nothing to "
            "compare: choose another foil.",
            field="foil",
        )
