"""The machine under the methods: texts x outputs, from rows of embeddings.

Everything that is explained is a few numbers, the outputs, read at a few positions of a few texts.
``Asked`` holds the texts of some questions of one shape and gives the outputs of any variants of
them, and their gradients. Nothing here knows a method.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
)

from helpers.architectures import body_of, once_a_model, pointwise_after_last_attention, stack_of
from helpers.errors import InputError
from helpers.machine import free_memory, products_in_float32, slow_precision, warn_if_slow
from helpers.progress import advance
from helpers.prompts import FINE, Unit
from helpers.questions import Facts, Question, output_logits, read_facts

# rows x seq in one pass. More was no faster on two CPU cores; a GPU wants more, how much more has
# not been measured.
TOKENS_PER_BATCH = {"cpu": 2048, "other": 16_384}
FULL_PASS = 256  # tokens in a pass from which a processor is about as fast as it gets
LOGITS_AT_ONCE = {"cpu": 2**25, "other": 2**28}  # numbers of whole vocabularies in one pass
ROWS_AT_ONCE = {"cpu": 2048, "other": 16_384}  # of the output layer, so that they stay near
PRECISIONS = {"bfloat16": torch.bfloat16}


# --- what is asked: texts, and outputs that are read in them -----------------------------------


@dataclass(frozen=True)
class Output:
    """One number: what text ``text`` says at ``position`` of token ``target``.

    Its log-probability, or with a ``foil`` (a token id; -1 for none) its logit minus that of the
    foil, which is the difference of their log-probabilities: the normaliser cancels. ``sign`` is -1
    for the tokens of a foil that is longer than one token.
    """

    text: int
    position: int
    target: int
    foil: int = -1
    sign: int = 1


def texts_and_outputs(question: Question) -> tuple[list[list[int]], list[Output]]:
    """The texts that have to be read for a question, as token ids, and its outputs.

    Target and foil share what they have in common; at the first token in which they differ one
    output compares the two, and what comes after it in each is read in a text of its own. An open
    target is -1. While it is open which of its options is the target, the outputs are the tokens of
    all options, one after the other.
    """
    ids = question.input_ids[0].tolist()
    if question.undecided:
        return _of_options(ids, [option.ids for option in question.options])
    target, foil = list(question.target or (-1,)), list(question.foil or ())
    last = len(ids) - 1
    if not foil:
        outputs = [Output(0, last + i, token) for i, token in enumerate(target)]
        return [ids + target[:-1]], outputs
    same = 0
    while target[same] == foil[same]:  # neither begins with the other
        same += 1
    texts: list[list[int]] = []
    outputs = [Output(0, last + same, target[same], foil[same])]
    for branch, sign in ((target, 1), (foil, -1)):
        rest = range(same + 1, len(branch))
        if rest:
            outputs += [Output(len(texts), last + i, branch[i], sign=sign) for i in rest]
            texts.append(ids + branch[:-1])
    return texts or [ids + target[:same]], outputs


def _of_options(ids, options):
    """Texts that have all options in them, and the outputs that are the tokens of each."""
    read = list(dict.fromkeys(option[:-1] for option in options))
    read = [some for some in read if not any(_goes_on(other, some) for other in read)]
    outputs = []
    for option in options:
        text = next(at for at, some in enumerate(read) if some[: len(option) - 1] == option[:-1])
        outputs += [Output(text, len(ids) - 1 + at, token) for at, token in enumerate(option)]
    return [ids + list(some) for some in read], outputs


def _goes_on(longer, some):
    return len(longer) > len(some) and longer[: len(some)] == some


class Shape(NamedTuple):
    """Questions of one shape can be run together."""

    columns: int
    lengths: tuple[int, ...]  # of the texts
    places: tuple[tuple[int, int, int], ...]  # text, position and sign of each output
    objective: str
    fine: bool


def shape_of(question: Question) -> Shape:
    """What questions that are run together have in common; see ``Asked`` for columns."""
    texts, outputs = texts_and_outputs(question)
    alone = question.foil is None and not question.undecided
    columns = len(texts[0]) if alone else question.input_ids.shape[1]
    places = tuple((o.text, o.position, o.sign) for o in outputs)
    fine = question.grouping in FINE
    return Shape(columns, tuple(map(len, texts)), places, question.objective, fine)


class Asked:
    """Some questions of one shape, and the model that answers them.

    ``embeds``   [questions, texts, length, dim]: what is read; a shorter text is filled up to the
                 right, which in a causal model no position before it sees
    ``columns``  positions that are explained: those of the prompt and, without a foil, of the
                 answer's own tokens before its last. Scores of tokens are [..., columns]
    ``outs``     the numbers that are explained: each output with ``each``, else their sum
    ``facts``    ``Facts`` a question, once the model has been run

    Rows are variants of the texts: [rows, texts, length, dim], of which row i belongs to the
    question ``owner[i]``; by default they are one for each question, or several in turn.
    """

    def __init__(self, model: Any, questions: Sequence[Question], each: bool = False):
        self.model, self.questions, self.each = model, list(questions), each
        if not each and any(question.undecided for question in self.questions):
            raise InputError(
                "The question has options, and none of them is its target yet: complete it with "
                "ask_of.",
                field="options",
            )
        texts, outputs = zip(*map(texts_and_outputs, self.questions), strict=True)
        shape = shape_of(self.questions[0])
        length = max(shape.lengths)
        table = model.get_input_embeddings()
        filled = [[text + text[-1:] * (length - len(text)) for text in some] for some in texts]
        self.input_ids = torch.tensor(filled, device=table.weight.device)
        self.embeds: Tensor = table(self.input_ids).detach()
        self.columns = shape.columns
        self.targets = torch.tensor([[o.target for o in some] for some in outputs])
        self.foils = torch.tensor([[o.foil for o in some] for some in outputs])
        self.normalised = (self.foils < 0) & (shape.objective == "log_probability")
        self.text_of, self.positions, self.signs = torch.tensor(shape.places).unbind(dim=1)
        self.known = all(question.probability is not None for question in self.questions)
        self.facts: list[Facts] | None = None
        self.found: dict[str, Any] = {}  # what one method leaves for another
        self.matrix: tuple[Tensor, Tensor | None] | None = None  # the output layer's, and its bias
        self._beginning: tuple[Tensor, DynamicCache | None] | None = None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def outs(self) -> int:
        return len(self.positions) if self.each else 1

    @property
    def units(self) -> list[list[Unit]]:
        return [question.units for question in self.questions]

    # --- values --------------------------------------------------------------------------------

    def values(self, rows: Tensor | None = None, owner: Tensor | None = None) -> Tensor:
        """What is explained, for each row: FloatTensor [rows, outs]; for the texts by default."""
        return self.values_of(self.read(self.embeds if rows is None else rows)[0], owner)

    def settle(self) -> None:
        """Run the texts once where something about the questions is open: see ``facts``.

        A variant that is run before the texts does so by itself.
        """
        if self.facts is None and not self.known:
            with torch.inference_mode():
                self.values()

    def read(
        self, rows: Tensor, places: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        """Run the model on rows; returns what their outputs read, and the keys and values.

        That is the last hidden state at ``places`` [rows, outputs], counted from the rows' first
        token: [rows, outputs, dim]. Of a model whose output layer is not a plain matrix it is the
        logits there: [rows, outputs, vocab].
        """
        if rows.data_ptr() != self.embeds.data_ptr() or len(rows) != len(self):
            self.settle()  # facts are read off the texts themselves, never off a variant
        places = self.positions.expand(len(rows), -1) if places is None else places
        keep = self.look(places, rows.shape[2])
        output = self.model(
            inputs_embeds=rows.flatten(0, 1),
            logits_to_keep=keep,
            **{"use_cache": False, **options},
        )
        advance(len(rows))
        found = self.gathered(output.logits) if self.matrix is None else output.logits
        if self.facts is None and not self.known:
            self._keep_facts(found.detach())
        return found, getattr(output, "past_key_values", None)

    def look(self, places: Tensor, length: int) -> int:
        """Say what the next pass is to read: ``places`` [rows, outputs] of rows of ``length``.

        Returns how many positions, counted from the last one, that are.
        """
        self.keep = int(length - places.min())
        self._at = places - length + self.keep
        return self.keep

    def gathered(self, states: Tensor) -> Tensor:
        """States at the places that are read: [rows, outputs, …] of [rows x texts, seq, …]."""
        states = states[:, -self.keep :].unflatten(0, (-1, self.embeds.shape[1]))
        rows = torch.arange(len(states), device=states.device)[:, None]
        return states[rows, self.text_of.to(states.device), self._at.to(states.device)]

    def values_of(self, read: Tensor, owner: Tensor | None = None) -> Tensor:
        """The values [rows, outs] of what was read: see ``read``."""
        each = self._each(read, owner)
        return each if self.each else each.sum(dim=1, keepdim=True)

    def slopes(self, read: Tensor, owner: Tensor) -> Tensor:
        """The gradient of each output with respect to what it reads: [rows, outputs, dim].

        ``read`` are last hidden states [rows, outputs, dim]. It is the target's row of the output
        layer, minus the foil's, or minus the mean row that the model itself expects; where the
        model caps or scales its logits, of what comes out of it.
        """
        with torch.enable_grad():
            read = read.detach().requires_grad_(True)
            end = read if self.matrix is not None else behind_layers(self.model, read)
            return torch.autograd.grad(self._each(end, owner).sum(), read)[0]

    def _each(self, read, owner):
        owner = torch.arange(len(self)).repeat(len(read) // len(self)) if owner is None else owner
        ids = torch.stack([self.targets, self.foils], dim=2)[owner].to(read.device)
        normalised = self.normalised[owner].to(read.device)
        if self.matrix is None:
            logits = read.float()
            target, foil = logits.gather(2, ids.clamp_min(0)).unbind(dim=2)  # [rows, outputs] each
            foil = foil.where(ids[..., 1] >= 0, 0)
            each = target - foil.where(~normalised, logits.logsumexp(dim=2))
        else:
            each = OutputLayer.apply(read, ids, normalised, *self.matrix)
        return each * self.signs.to(each)

    def _keep_facts(self, read):
        """Read off the first pass over the texts what the model itself would say."""
        plain = self.signs > 0
        most = vocabularies_at_once(self.model, len(self.positions))
        self.facts = []
        for row, question in enumerate(self.questions):
            if row % most == 0:
                some = read[row : row + most]
                with torch.no_grad():
                    logits = some if self.matrix is None else output_logits(some, *self.matrix)
            seen = logits[row % most, plain.to(logits.device)].float()
            self.facts.append(read_facts(seen, question.target, question.rival))
        found = torch.tensor([[facts.target[0]] for facts in self.facts])
        self.targets = found.where(self.targets < 0, self.targets)  # those that were open

    # --- gradients -----------------------------------------------------------------------------

    def reactions(
        self, rows: Tensor, of: Callable[[Tensor], Tensor], owner: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Values [rows, outs], and ``of`` each out's gradient: [rows, outs, …].

        ``of`` is given gradients [rows, columns, dim]. That of a position that several texts share
        is the sum over them.
        """
        rows = rows.detach().requires_grad_(True)  # a leaf
        values = self.values(rows, owner)
        each = [of(self.in_columns(grad)) for (grad,) in self.gradients(values, rows)]
        return values.detach(), torch.stack(each, dim=1)

    def gradients(
        self, values: Tensor, *inputs: Tensor, keep: bool = False
    ) -> Iterator[tuple[Tensor, ...]]:
        """The gradients of each out with respect to ``inputs``; the graph goes with the last."""
        for out in range(values.shape[1]):
            more = keep or out < values.shape[1] - 1
            yield torch.autograd.grad(values[:, out].sum(), inputs, retain_graph=more)

    def in_columns(self, some: Tensor) -> Tensor:
        """[rows, texts, length, …] as [rows, columns, …], added up over the texts."""
        return some[:, :, : self.columns].sum(dim=1)

    def members(self, row: int) -> Tensor:
        """Which columns each unit of one question holds: BoolTensor [units, columns]."""
        units = self.units[row]
        member = torch.zeros(len(units), self.columns, dtype=torch.bool)
        for index, unit in enumerate(units):
            member[index, list(unit.positions)] = True
        return member

    def per_unit(self, scores: Tensor, row: int) -> Tensor:
        """Scores of tokens [..., columns] of one question, added up inside its units."""
        return scores @ self.members(row).to(scores).T

    # --- variants ------------------------------------------------------------------------------

    def beginning(self) -> tuple[Tensor, DynamicCache | None]:
        """The texts' values [questions, outs], and their keys and values where a model keeps them.

        Computed once: variants share what comes before their first change.
        """
        if self._beginning is None:
            read, cache = self.read(self.embeds, use_cache=True)
            whole = isinstance(cache, DynamicCache) and not any(cache.is_sliding)
            self._beginning = self.values_of(read), cache if whole else None
        return self._beginning

    def erased(self, owner: Tensor, masks: Tensor, blank: Tensor | None) -> Tensor:
        """The values of variants with some columns erased: FloatTensor [variants, outs].

        ``owner`` LongTensor [variants] names the question of each, ``masks`` BoolTensor [variants,
        columns] what goes. ``blank`` [questions, columns, dim] stands in its place; ``None`` takes
        it out of the text, so that what follows moves up.

        A causal model computes a position from those before it, so up to its first erased column a
        variant is the text itself. That part is computed once and shared: variants are run in the
        order of their first change, a group from the first one of its first member.
        """
        texts, length = self.embeds.shape[1:3]
        read_first = int(self.positions.min())
        firsts = torch.where(masks.any(dim=1), masks.int().argmax(dim=1), length - 1)
        firsts = firsts.clamp_max(read_first)
        if blank is None:  # what is read may then stand at the last token that stays
            firsts = (firsts - 1).clamp_min(0)
        order = firsts.argsort(stable=True)
        groups, ran = [], []
        with torch.inference_mode():
            _, cache = self.beginning()
            while len(order):
                first = int(firsts[order[0]]) if cache is not None else 0
                size = max(1, FULL_PASS // ((length - first) * texts))
                group, order = order[:size], order[size:]

                def run(some, first=first):
                    return self._erased_rows(owner[some], masks[some], blank, first, cache)

                groups.append(torch.cat(self.in_batches(run, group, length - first)))
                ran.append(group)
        return torch.cat(groups)[torch.cat(ran).argsort()]

    def _erased_rows(self, owner, masks, blank, first, cache):
        device = self.embeds.device
        texts, length = self.embeds.shape[1:3]
        rows = self.embeds[owner.to(device), :, first:]  # [rows, texts, length - first, dim]
        gone = F.pad(masks, (0, length - masks.shape[1]))[:, first:]  # [rows, length - first]
        places = self.positions.expand(len(rows), -1) - first
        if blank is None:
            blank = end_of_text(self.model).expand(len(self), self.columns, -1)
            kept = ~gone
            prompt = self.questions[0].input_ids.shape[1]
            nothing = ~kept[:, :prompt].any(dim=1) & (first == 0)
            stand_in = F.pad(nothing[:, None], (0, length - first - 1))  # of an empty prompt
            index = (gone & ~stand_in).int().argsort(dim=1, stable=True)  # what stays comes first
            places = (~(gone & ~stand_in)).cumsum(dim=1).gather(1, places) - 1
            gone = (gone & stand_in).gather(1, index)
            index = index[:, None, :, None].expand(-1, texts, -1, rows.shape[-1]).to(device)
            rows = rows.gather(2, index)
        put = F.pad(blank, (0, 0, 0, length - blank.shape[1]))[owner.to(blank.device), None, first:]
        read = int(places.max()) + 1  # what was taken out stands behind, where nobody looks
        rows, gone, put = rows[:, :, :read], gone[:, :read], put[:, :, :read]
        rows = torch.where(gone[:, None, :, None].to(device), put.to(rows), rows)
        options = {}
        if first:
            past = DynamicCache()
            at = (owner[:, None] * texts + torch.arange(texts)).flatten().to(device)
            for layer, kept_states in enumerate(cache.layers):
                keys, values = (
                    some[:, :, :first].index_select(0, at.to(some.device))
                    for some in (kept_states.keys, kept_states.values)
                )
                past.update(keys, values, layer)
            options = {"past_key_values": past, "use_cache": True}
        return self.values_of(self.read(rows, places, **options)[0], owner)

    def in_batches(self, run: Callable, items: Any, length: int) -> list:
        """``in_batches`` for rows of ``length`` tokens a text, whole vocabularies counted too."""
        most = None
        if self.matrix is None:
            most = vocabularies_at_once(self.model, len(self.positions))
        return in_batches(self.model, run, items, length * self.embeds.shape[1], most)


class OutputLayer(torch.autograd.Function):
    """Outputs [rows, outputs] from their states [rows, outputs, dim], and their slopes there.

    ``ids`` [rows, outputs, 2] are target and foil, -1 for none; where ``normalised`` [rows,
    outputs], the logarithm of the sum over the vocabulary is taken off. The output layer's rows are
    read in portions, each used twice while it is near: for the logits, and for the mean row that
    the model expects, which is the normaliser's slope.
    """

    @staticmethod
    def forward(ctx, states, ids, normalised, weight, bias):
        there = (ids >= 0) * torch.tensor([1.0, -1.0], device=ids.device)
        ids = ids.clamp_min(0)
        slopes = (weight[ids].float() * there[..., None]).sum(dim=2)  # [rows, outputs, dim]
        values = (slopes * states.float()).sum(dim=2)
        if bias is not None:
            values += (bias[ids].float() * there).sum(dim=2)
        if normalised.any():
            some, with_mean = states[normalised].float(), ctx.needs_input_grad[0]
            logs, mean = _normaliser(some, weight, bias, with_mean)
            values[normalised] -= logs
            slopes[normalised] -= mean
        ctx.save_for_backward(slopes.to(states.dtype))
        return values

    @staticmethod
    def backward(ctx, grad):
        (slopes,) = ctx.saved_tensors
        return grad[..., None].to(slopes) * slopes, None, None, None, None


def _normaliser(states, weight, bias, with_mean):
    """The logarithm of the sum over the vocabulary [n] of states [n, dim], and its slope [n, dim].

    What was summed is scaled down whenever a larger logit appears, so that nothing overflows.
    """
    size = ROWS_AT_ONCE["cpu" if weight.device.type == "cpu" else "other"]
    top = states.new_full((len(states), 1), -torch.inf)
    total, mean = torch.zeros_like(top), torch.zeros_like(states)
    for first in range(0, len(weight), size):
        rows = weight[first : first + size].float()
        logits = F.linear(
            states, rows, None if bias is None else bias[first : first + size].float()
        )
        before, top = top, torch.maximum(top, logits.amax(dim=1, keepdim=True))
        shares, scale = (logits - top).exp_(), (before - top).exp()
        total = total * scale + shares.sum(dim=1, keepdim=True)
        if with_mean:
            mean = mean * scale + shares @ rows
    return (top + total.log())[:, 0], mean / total


@contextlib.contextmanager
def asking(model: Any, questions: Sequence[Question], each: bool = False) -> Iterator[Asked]:
    """``Asked`` for questions of one shape, the model computing only what they depend on.

    After the last layer's attention only the positions that are read go on: its output projection
    and feed-forward are computed there alone. A model whose output layer is not a plain matrix, or
    lies outside of memory, is left as it is. The model is as it was found when this ends.
    """
    asked = Asked(model, questions, each)
    head = plain_output_layer(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(products_in_float32(model))
        if head is not None:
            weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
            asked.matrix = weight, bias
            stack.callback(model.set_output_embeddings, head)
            model.set_output_embeddings(
                _Instead(lambda hidden: asked.gathered(hidden).to(weight.device))
            )
        for module in pointwise_after_last_attention(model) if head is not None else ():
            length = [0]

            def cut(module, args, length=length):
                length[0] = args[0].shape[1]
                return (args[0][:, -asked.keep :],)

            def fill(module, args, out, length=length):
                return F.pad(out, (0, 0, length[0] - out.shape[1], 0))

            stack.enter_context(module.register_forward_pre_hook(cut))
            stack.enter_context(module.register_forward_hook(fill))
        yield asked


def plain_output_layer(model: Any) -> nn.Linear | None:
    """The output layer of ``model`` if it is a plain matrix in memory, else ``None``.

    Nor is it plain where the model does something to the logits that come out of it, such as a cap
    or a scale.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not nn.Linear or not head.weight.is_floating_point() or head.weight.is_meta:
        return None
    state = head.weight[:1, None]
    try:
        model.set_output_embeddings(_Instead(lambda hidden: state))
        as_they_are = behind_layers(model, state) is state
    except Exception:  # a model that asks more of its layers
        as_they_are = False
    finally:
        model.set_output_embeddings(head)
    return head if as_they_are else None


def behind_layers(model: Any, states: Tensor) -> Tensor:
    """The logits [rows, seq, vocab] that ``model`` makes of last hidden states [rows, seq, dim]."""
    name = body_of(model)
    body = getattr(model, name)
    try:
        setattr(model, name, _Instead(lambda *_, **__: _Given(states)))
        return model.forward(inputs_embeds=states, use_cache=False).logits
    finally:
        setattr(model, name, body)


class _Given(SimpleNamespace):
    """An output of layers that holds states, and nothing else that may be asked for."""

    def __init__(self, states: Tensor):
        super().__init__(last_hidden_state=states)

    def __getitem__(self, index):
        return self.last_hidden_state

    def __getattr__(self, name):
        return None


class _Instead(nn.Module):
    """A function in the place of a module."""

    def __init__(self, function: Callable):
        super().__init__()
        self.forward = function


def mean_embedding(model: Any) -> Tensor:
    """The mean of all token embeddings, [dim] in float32, as the layer gives them.

    A layer may do more than look a row up: Gemma's multiplies by the root of the width.
    """
    table = model.get_input_embeddings()
    if type(table) is nn.Embedding:
        return table.weight.detach().float().mean(dim=0)
    ids = torch.arange(len(table.weight), device=table.weight.device)
    with torch.no_grad():
        return sum(table(some).double().sum(dim=0) for some in ids.split(4096)).float() / len(ids)


def end_of_text(model: Any) -> Tensor:
    """The embedding of the end-of-text token, [dim]."""
    eos = model.config.eos_token_id
    table = model.get_input_embeddings()
    eos = eos[0] if isinstance(eos, list) else eos
    return table(torch.tensor(eos, device=table.weight.device)).detach()


# --- the same in one line, for notebooks -------------------------------------------------------


def embed_prompt(model: Any, question: Question) -> Tensor:
    """The prompt's token embeddings [1, seq, dim], detached: the input that is explained.

    Introduced in notebooks/04_embeddings.ipynb.
    """
    return model.get_input_embeddings()(question.input_ids).detach()


def objective(model: Any, embeds: Tensor, question: Question) -> Tensor:
    """The number that is explained, FloatTensor [rows], of rows of ``embeds`` [rows, seq, dim].

    ``log p(target | prompt) - log p(foil | prompt)`` in nats, or raw logits where the question asks
    for them. Rows stand in the place of the prompt; target and foil are what they are.

    notebooks/05_gradients.ipynb takes it apart.
    """
    with asking(model, [question]) as asked:
        texts, length = asked.embeds.shape[1:3]
        behind = asked.embeds[0, :, embeds.shape[1] : length]  # [texts, rest, dim]
        rows = torch.cat(
            [
                embeds[:, None].expand(-1, texts, -1, -1),
                behind.expand(len(embeds), -1, -1, -1).to(embeds),
            ],
            dim=2,
        )
        return asked.values(rows, torch.zeros(len(embeds), dtype=torch.long))[:, 0]


def objective_gradient(model: Any, embeds: Tensor, question: Question) -> Tensor:
    """The gradient of the objective with respect to ``embeds``, of the same shape.

    ``autograd.grad`` computes this gradient and no other; ``backward()`` would also fill the
    ``.grad`` of every weight that is not frozen.

    Introduced in notebooks/05_gradients.ipynb.
    """
    embeds = embeds.detach().requires_grad_(True)  # a leaf
    (grad,) = torch.autograd.grad(objective(model, embeds, question).sum(), embeds)
    return grad


# --- the model while a method runs -------------------------------------------------------------


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Ask no gradient of any weight while inside, and leave the model as it was found."""
    thawed = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in thawed:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in thawed:
            weight.requires_grad_(True)


@contextlib.contextmanager
def working_precision(model: Any, precision: str | None) -> Iterator[None]:
    """Do the products with weights in ``precision`` while inside; ``None`` leaves all as it is.

    Weights are cast once, where autocast would cast frozen ones at every pass. The residual stream,
    the norms, the rotary angles, attention (whose fused backward pass is slower in half precision
    on a CPU) and the answer's logits stay in float32. Takes half of the model's memory once more.
    Raises ``InputError`` for a precision that is not known, and for a model whose attention is its
    own.
    """
    if precision is None:
        yield
        return
    if precision not in PRECISIONS:
        raise InputError(f"The precision {precision!r} is unknown: use {', '.join(PRECISIONS)}.")
    dtype, table = PRECISIONS[precision], model.get_input_embeddings().weight
    warn_if_slow(slow_precision(dtype, table.shape[-1], table.device))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module is not head
        and module.weight.dtype == torch.float32
        and not module.weight.is_meta  # offloaded to disk or CPU memory
    ]
    refused = refuses_attending(model) if linears else None
    if refused is not None:
        raise InputError(f"The precision {precision} cannot be used. {refused}")
    with contextlib.ExitStack() as stack:
        for linear in linears:
            for name, weight in list(linear.named_parameters()):
                stack.callback(setattr, linear, name, weight)
                cast = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                setattr(linear, name, cast)
            hook = linear.register_forward_pre_hook(lambda m, args: (args[0].to(dtype),))
            stack.enter_context(hook)
        if linears:
            stack.enter_context(attending(model, sdpa))
            stack.callback(_attend_in_float32.reset, _attend_in_float32.set(True))
        yield


# --- attention ---------------------------------------------------------------------------------

OURS = "helpers"  # the name under which transformers finds what a method attends through
_attend: ContextVar[Callable] = ContextVar("attend")
_attend_in_float32: ContextVar[bool] = ContextVar("attend_in_float32", default=False)
AttentionInterface.register(OURS, lambda *args, **options: _attend.get()(*args, **options))
AttentionMaskInterface.register(OURS, AttentionMaskInterface()["sdpa"])


@contextlib.contextmanager
def attending(model: Any, function: Callable) -> Iterator[None]:
    """Let every layer attend through ``function`` while inside; it takes what torch's own takes.

    ``function(module, query, key, value, mask, scaling, **options)`` returns the attention's output
    [rows, seq, heads, head_dim] and ``None``; ``sdpa`` below is torch's fused one, to call it with.
    Nothing is registered for it: transformers knows one name, which leads here.
    """
    found = model.config._attn_implementation
    token = _attend.set(function)
    try:
        model.set_attn_implementation(OURS)
        yield
    finally:
        model.set_attn_implementation(found)
        _attend.reset(token)


@once_a_model
def refuses_attending(model: Any) -> str | None:
    """``None`` for a model that can attend through a function of ours, else why it cannot.

    It is tried once a model, on a few tokens: whether every layer comes here, and whether what
    comes out is what the model makes of them by itself.
    """
    try:
        if _attends_through_ours(model):
            return None
    except (AttributeError, InputError, ValueError):  # its attention cannot be chosen
        pass
    return f"The attention of a {type(model).__name__} is its own and cannot be watched."


def _attends_through_ours(model):
    layers, came = stack_of(model).layers, set()

    def watched(module, *args, **options):
        came.add(module)
        return sdpa(module, *args, **options)

    def run():
        return last_states(model, few_tokens(model)).float()

    with torch.no_grad():
        own = run()
        with attending(model, watched):
            ours = run()
    most = 1e-3 if model.get_input_embeddings().weight.dtype == torch.float32 else 0.1
    near = (own - ours).abs().max() <= most * own.abs().max()
    return bool(near) and len(came) == len(layers)


def last_states(model: Any, embeds: Tensor) -> Tensor:
    """The last hidden states [rows, seq, dim] of embeds [rows, seq, dim], behind the last norm."""
    return getattr(model, body_of(model))(inputs_embeds=embeds, use_cache=False)[0]


def few_tokens(model: Any) -> Tensor:
    """The embeddings of a few tokens, [1, few, dim], to try something on."""
    table = model.get_input_embeddings()
    return table(torch.arange(3, 7, device=table.weight.device))[None].detach()


def sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's fused attention, in float32 where ``working_precision`` asks for it.

    A cap on the logits (Gemma 2) it does not know: the maps are formed then. A sink (gpt-oss),
    which takes a share of the weight and brings nothing, is a first position of its own.
    """
    dtype = torch.float32 if _attend_in_float32.get() else query.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if softcap is not None:
        weights = attention_weights(query, key, mask, options["scaling"], softcap, s_aux)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (weights.to(values.dtype) @ values).transpose(1, 2), None
    if s_aux is not None:
        seen = _seen(query, mask, torch.arange(query.shape[2], device=query.device))
        seen = seen.expand(len(query), query.shape[1], -1, -1)
        sink = s_aux.view(1, -1, 1, 1).expand(*seen.shape[:3], 1)
        mask = query.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
        mask = torch.cat([sink.to(mask), mask], dim=3)
        key, value = F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))
    return AttentionInterface()["sdpa"](module, query, key, value, mask, **options)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    at: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The attention weights of some positions, [rows, heads, positions, seq] in float32.

    ``query`` [rows, heads, seq, dim], ``key`` [rows, kv heads, seq, dim]; ``at`` LongTensor
    [positions] are those that look, all by default. A ``mask`` of ``None`` is the causal one.
    ``softcap`` bounds the logits; ``s_aux`` [heads] are those of a sink, whose share is left out,
    so that rows then sum to less than 1.
    """
    at = torch.arange(query.shape[2]) if at is None else at
    at = at.to(query.device)
    grouped = query[:, :, at].unflatten(1, (key.shape[1], -1))  # [rows, kv heads, per kv, at, dim]
    logits = (grouped @ key[:, :, None].transpose(-1, -2)).float().flatten(1, 2) * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~_seen(query, mask, at), -torch.inf)
    if s_aux is None:
        return logits.softmax(dim=-1)
    sink = s_aux.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([sink, logits], dim=3).softmax(dim=-1)[..., 1:]


def _seen(query, mask, at):
    """Which positions those in ``at`` see: BoolTensor [1, 1, at, seq]."""
    seq = query.shape[2]
    if mask is None:
        return (torch.arange(seq, device=query.device) <= at[:, None])[None, None]
    return mask[:1, :1, at, :seq]  # a sliding window, the same in all rows


# --- batches -----------------------------------------------------------------------------------


def rows_per_batch(seq: int, tokens: int = TOKENS_PER_BATCH["cpu"]) -> int:
    """How many prompts of ``seq`` tokens go through the model together, at ``tokens`` a pass."""
    return max(1, tokens // seq)


def token_budget(model: Any) -> int:
    """Tokens (rows x seq) that one forward and backward pass may take.

    As many as make the machine fast, unless half of the memory that is free holds fewer.
    """
    device = model.get_input_embeddings().weight.device
    most = TOKENS_PER_BATCH["cpu" if device.type == "cpu" else "other"]
    return max(1, min(most, int(0.5 * free_memory(device) / gradient_bytes(model))))


def vocabularies_at_once(model: Any, outputs: int) -> int:
    """How many rows may have the logits of the whole vocabulary at so many places together."""
    table = model.get_input_embeddings().weight
    most = LOGITS_AT_ONCE["cpu" if table.device.type == "cpu" else "other"]
    return max(1, most // (outputs * len(table)))


def gradient_bytes(model: Any) -> int:
    """Bytes a token keeps between the forward and the backward pass through frozen weights.

    Per layer: 8 vectors of the model's width (both norms' inputs and outputs, queries, keys,
    values, the heads' output) and 3 of the feed-forward's; a little more for what comes and goes.
    """
    config = getattr(model.config, "get_text_config", lambda: model.config)()
    if not hasattr(config, "hidden_size"):
        return 1
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    floats = 8 * config.hidden_size + 3 * inner
    return int(1.05 * 4 * config.num_hidden_layers * floats)


def in_batches(model: Any, run: Callable, items: Any, seq: int, most: int | None = None) -> list:
    """``run`` on consecutive slices of ``items``, its results as a list.

    ``items`` is anything with a length that can be sliced; each stands for one row of ``seq``
    tokens. A slice holds what ``token_budget`` allows, ``most`` items at the utmost, and is halved
    when memory runs out all the same; what was computed is kept. One row that does not fit raises
    the error it met.
    """
    size = min(rows_per_batch(seq, token_budget(model)), most or len(items) or 1)
    results, done = [], 0
    while done < len(items):
        some = items[done : done + size]
        result = _unless_out_of_memory(run, some)
        if result is None:
            size = len(some) // 2
            clear_device_cache(garbage_collection=True)
        else:
            results.append(result)
            done += len(some)
    return results


def _unless_out_of_memory(run, some):
    """``run(some)``, or ``None`` if memory ran out and ``some`` can still be halved.

    A function of its own, so that the error is gone when it returns, and with it the tensors that
    its traceback holds.
    """
    try:
        return run(some)
    except (RuntimeError, MemoryError) as error:
        ran_out = isinstance(error, MemoryError) or should_reduce_batch_size(error)
        if len(some) == 1 or not ran_out:
            raise
        return None
