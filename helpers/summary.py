"""What a question's attributions say at first sight: which words, what without them, how sure.

Text for people: probabilities in per cent, words in the order of the prompt, sentences. Whatever a
prompt holds is shown as text, never as markup.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from IPython.display import display

from helpers.attribution import METHODS, Attribution, asking, attribute, attribute_all
from helpers.attribution.methods import erasure_size
from helpers.attribution.perturbation import coalition_values
from helpers.coloured import (
    BROKEN,
    FEW,
    coloured_text,
    in_line,
    percent,
    quoted,
    stylesheet,
    told_apart,
)
from helpers.faithfulness import against_random
from helpers.progress import progress
from helpers.prompts import (
    FINE,
    Unit,
    decoded,
    joined_units,
    prompt_units,
    shortened,
    token_labels,
)
from helpers.questions import Option, Question, greedy_answer
from helpers.tables import NOT_WRITTEN, ranked_units, written_first

TRUSTED = ("find_then_rank", "occlusion", "relevance")  # see "Which method to believe", README
# What a report runs: these, the three usual methods beside them, and the control.
REPORTED = (*TRUSTED, "saliency", "attention", "integrated_gradients", "random")
REPORTED_LONG = ("occlusion", "relevance", "attention", "random")  # of a long prompt
LONG = 400  # tokens from which on a prompt is read coarse to fine
BLOCKS = 20  # of sentences, in a long prompt
STRONGEST = 3  # units that get a number
HALVED = 0.69  # nats: the odds of the answer are half of what they were
LONGEST = 2000  # characters of what is shown of one token of an answer
TOKENS = 3  # of an answer without a foil; of more, each is shown by itself


@dataclass(frozen=True)
class Without:
    """What was found with some units gone.

    ``units`` are their numbers, ``log_probability`` is that of the target in nats, ``against`` its
    probability if the answer had to be target or foil (``None`` without a foil), ``moved`` how far
    the objective fell, in nats. ``options`` are the log-probabilities of the question's options,
    and ``shares`` their probabilities if the answer had to be one of them.
    """

    units: tuple[int, ...]
    log_probability: float
    against: float | None
    moved: float
    options: tuple[float, ...] = ()

    @property
    def shares(self) -> list[float]:
        return torch.tensor(self.options).softmax(dim=0).tolist()


@dataclass(frozen=True, repr=False)
class Summary:
    """What one question's attributions come to. Jupyter shows the page's first screen of it.

    ``whole``      what was found with all units there
    ``method``     whose order is shown: the one of ``TRUSTED`` that erasing bears out best here
    ``strongest``  numbers of the units that it puts first, of those that somebody wrote
    ``without``    what was found without each of these, and without all of them
    ``each``       scores of every output token by itself [outputs, units], where there are several
    ``outputs``    these tokens as text
    ``inside``     the words of the strongest unit, where that is a sentence or more
    ``borne_out``  ``"yes"``, ``"weak"`` or ``"no"``; ``trust`` are the sentences that say why
    ``top_units``  ``{method: labels}``, the strongest of each
    ``character``  the one that the target ends inside of, as the model would complete it
    """

    question: Question
    whole: Without
    method: str
    scores: torch.Tensor
    signed: bool
    strongest: tuple[int, ...]
    without: tuple[Without, ...]
    borne_out: str
    trust: tuple[str, ...]
    top_units: Mapping[str, list[str]]
    each: torch.Tensor | None = None
    outputs: tuple[str, ...] = ()
    inside: "Summary | None" = None
    character: str = ""

    @property
    def heading(self) -> str:
        """The question in words."""
        target, foil = self.question.target_label or "", self.question.foil_label
        if len(target) > FEW:
            return "Why this answer?"
        if foil is None:
            return f"Why {self._target}?"
        alike = target.strip() == foil.strip()
        names = told_apart([target, foil]) if alike else (self._target, quoted(foil))
        pair = "Why {} rather than {}".format(*names)
        options = self.question.options
        if not options:
            return f"{pair}?"
        likeliest = max(range(len(options)), key=self.whole.options.__getitem__)
        place = "next" if options[likeliest].ids == self.question.target else "likeliest"
        return f"{pair}, the {place} of {len(options)} options?"

    @property
    def answered(self) -> str:
        """What the model goes on with, and how probable what was asked about is."""
        question, target = self.question, self._target
        share = f"{self._share(self.whole)}{self._of_a_token}"
        told = f"After this prompt the model goes on with {target}: {share}."
        if not question.own and question.rank == 1:
            told = f"Asked about {target}: {share}. The model itself goes on otherwise."
        elif not question.own:
            before = question.input_ids[0].tolist()
            own = decoded(question.tokenizer, [question.top or 0], before)
            goes_on = f"{quoted(own)} ({percent(question.top_probability or 0.0)})"
            told = f"Asked about {target}: {share}. The model itself goes on with {goes_on}."
        if self.whole.against is None:
            return told
        if question.options:
            share = self.whole.shares[self._place]
            return f"{told} Had it to be one of the {len(question.options)}: {percent(share)}."
        return f"{told} Had it to be one of the two: {percent(self.whole.against)}."

    @property
    def _target(self):
        """The target in quotes; of the first bytes of a character, the whole character."""
        label = self.question.target_label or ""
        if self.character and not label.strip(f"{BROKEN} "):
            return f"a part of {quoted(self.character)}"
        return quoted(label)

    @property
    def _place(self):
        """Which of the options is the target."""
        return [option.ids for option in self.question.options].index(self.question.target)

    @property
    def _long(self):
        """Whether the answer is so long that its probability as a whole says nothing."""
        return self.question.foil is None and len(self.question.target or ()) > TOKENS

    @property
    def _of_a_token(self):
        return " a token in the geometric mean" if self._long else ""

    def _share(self, found):
        """The probability in words: as a whole, or a token's in the geometric mean."""
        tokens = len(self.question.target or ()) if self._long else 1
        return percent(math.exp(found.log_probability / tokens))

    @property
    def removed(self) -> list[str]:
        """A sentence for each of the strongest units, and one for all of them together."""
        foil, what = self.question.foil_label, f"the probability of {self._target}"
        if self._long:
            what = "the probability of a token of the answer"
        if foil is not None:
            what = f"{self._target} against {quoted(foil)}"
        options = self.question.options
        if options:
            names = told_apart([option.label for option in options])
            what = f"{names[self._place]} among the {len(names)} options"
        told = []
        for found in self.without:
            gone = [self._name(unit) for unit in found.units]
            name = gone[0] if len(gone) == 1 else f"all {('', '', 'two', 'three')[len(gone)]}"
            falls, then = found.moved > 0, ""
            both = [
                self._share(some) if some.against is None else percent(some.against)
                for some in (self.whole, found)
            ]
            if options:
                was, shares = self.whole.shares, found.shares
                falls = shares[self._place] < was[self._place]
                both = [percent(some[self._place]) for some in (was, shares)]
                first = shares.index(max(shares))
                if first not in (self._place, was.index(max(was))):
                    then = f"; the likeliest is then {names[first]} ({percent(shares[first])})"
            moves = f"{'falls' if falls else 'rises'} from {both[0]} to {both[1]}"
            moves = f"stays at {both[0]}" if both[0] == both[1] else moves
            told.append(f"Without {name}, {what} {moves}{then}.")
        return told

    @property
    def option_rows(self) -> list[list[str]]:
        """The options as a table of text, a header first and the likeliest option next.

        Columns: the option, its probability, its share if the answer had to be one of them, and
        that share without each of the strongest units and without all of them. No rows where the
        question has no options.
        """
        options = self.question.options
        if not options:
            return []
        numbers = [len(found.units) == 1 for found in self.without]
        columns = [f"without {at + 1}" if one else "without all" for at, one in enumerate(numbers)]
        rows = [["option", "probability", "share", *columns]]
        names, shares = told_apart([option.label for option in options]), self._shares
        for at in sorted(range(len(options)), key=lambda at: -self.whole.options[at]):
            chance = percent(math.exp(self.whole.options[at]))
            rows.append([names[at], chance, *(percent(some[at]) for some in shares)])
        return rows

    @property
    def _shares(self):
        """Those of the options with all units there, and without some: [1 + without, options]."""
        return [self.whole.shares, *(found.shares for found in self.without)]

    def _options_html(self):
        """The table of the options; the likeliest of each column is bold."""
        rows = self.option_rows
        if not rows:
            return
        yield '<p class="legend">Share: of an answer that had to be one of these, found by running '
        yield "the model without the units of these numbers. The likeliest is bold.</p>"
        heads = "".join(f'<th scope="col">{head}</th>' for head in rows[0])
        yield f'<div class="options"><table><thead><tr>{heads}</tr></thead><tbody>'
        order = sorted(range(len(rows) - 1), key=lambda at: -self.whole.options[at])
        best = [order[0], *(shares.index(max(shares)) for shares in self._shares)]
        for at, (name, *cells) in zip(order, rows[1:], strict=True):
            yield f'<tr><th scope="row" dir="auto">{html.escape(name)}</th>'
            told = [
                f"<b>{cell}</b>" if at == most else cell
                for cell, most in zip(cells, best, strict=True)
            ]
            yield f"{''.join(f'<td>{cell}</td>' for cell in told)}</tr>"
        yield "</tbody></table></div>"

    def facts(self) -> dict[str, Any]:
        """Plain values for ``report.json``."""
        return {
            "heading": self.heading,
            "answered": self.answered,
            "answer": self.question.answer,
            "probability": self.question.probability,
            "method": self.method,
            "strongest": list(self.strongest),
            "top_units": {
                name: [shortened(label) for label in labels]
                for name, labels in self.top_units.items()
            },
            "options": self._option_facts(),
            "inside": [] if self.inside is None else self.inside.facts()["without"],
            "without": [
                {"units": [shortened(self.question.units[unit].label) for unit in found.units]}
                | {"probability": math.exp(found.log_probability), "against": found.against}
                for found in self.without
            ],
            "trust": {"borne_out": self.borne_out, "sentences": list(self.trust)},
            "warnings": self.notes,
        }

    def _option_facts(self):
        shares = list(zip(*self._shares, strict=True))  # [options, 1 + without]
        return [
            {"option": option.label, "probability": math.exp(self.whole.options[at])}
            | {"share": shares[at][0], "without": list(shares[at][1:])}
            for at, option in enumerate(self.question.options)
        ]

    def __repr__(self) -> str:
        lines = [self.heading, self.answered, *self.removed]
        if self.question.options:
            head, *rows = self.option_rows
            lines.append(pd.DataFrame(rows, columns=head).to_string(index=False))
        if self.inside is not None:
            lines += [f"Inside {self._name(self.strongest[0])}:", *self.inside.removed]
        lines += [*self.trust, *self.notes]
        return "\n".join(lines)

    @property
    def notes(self) -> list[str]:
        """What makes the question a weak one; of a text that is quoted there, the beginning."""
        return [shortened(note) for note in self.question.notes]

    def _repr_html_(self):
        legend = f'<p class="legend">{html.escape(self._legend)}{self._jumps}</p>'
        text = [self._coloured(), legend]
        found = [
            "<ol>",
            *(f'<li dir="auto">{html.escape(line)}</li>' for line in self._each),
            "</ol>",
            *(f"<p>{html.escape(line)}</p>" for line in self._together),
            *self._options_html(),
            f'<p class="trust {self.borne_out}"><b>{self.verdict}</b> '
            f"{html.escape(' '.join(self.trust))}</p>",
            *(f'<p class="warning">{html.escape(note)}</p>' for note in self.notes),
            *self._inside_html(),
        ]
        both = [*text, *found]
        if self._jumps:  # what was found would be many screens below
            both = [*found, "<h2>The prompt</h2>", *reversed(text)]
        body = [
            f"<style>{stylesheet()}</style>",
            f"<h1>{html.escape(self.heading)}</h1>",
            f'<p class="answered" dir="auto">{html.escape(self.answered)}</p>',
            *both,
            *self._outputs_html(),
        ]
        return f'<div class="summary">{"".join(body)}</div>'

    @property
    def verdict(self) -> str:
        """Whether the tests bear the strongest units out, in two words."""
        told = {"yes": "Borne out.", "weak": "Weakly borne out.", "no": "Not borne out."}
        return told[self.borne_out]

    def _inside_html(self):
        """The strongest unit's words, coloured, and what was found without the strongest."""
        if self.inside is None:
            return
        yield f"<h2>Inside {html.escape(self._name(self.strongest[0]))}</h2>"
        yield self.inside._coloured(only=self.question.units[self.strongest[0]].positions)
        yield '<p class="legend">Coloured by relevance, which proposed these words.</p>'
        lines = [f'<li dir="auto">{html.escape(line)}</li>' for line in self.inside.removed]
        yield f"<ol>{''.join(lines)}</ol>"

    def _coloured(self, only=None):
        """The prompt, or those of its units that hold tokens of ``only``, coloured."""
        units = self.question.units
        places = [i for i, u in enumerate(units) if only is None or set(u.positions) <= set(only)]
        return coloured_text(
            [units[i].label for i in places],
            self.scores[places],
            [units[i].part for i in places],
            [places.index(i) for i in self.strongest],
            signed=self.signed,
            anchors=only is None,
        )

    def _name(self, unit):
        return quoted(self.question.units[unit].label)

    def _outputs_html(self):
        """The answer as running text, in which each token opens to what it came from.

        The style sheet sets the tokens in a line. Without it, they are a list with numbers.
        """
        if self.each is None or not self._long:
            return
        yield "<h2>The answer, token by token</h2>"
        yield (
            '<p class="legend">Choose a token to see what it came from: words of the prompt, and '
            "of the answer before it. At the top is what the whole answer came from.</p>"
        )
        tokens = map(self._output, range(len(self.outputs)))
        yield f'<div class="answer" dir="auto">{"".join(tokens)}</div>'

    def _output(self, number):
        """One token of the answer: its text, and what it came from where it is opened."""
        end = self.question.input_ids.shape[1] + number  # it was written after what comes before
        units, every = self.question.units, self.each[number]
        places = [i for i, unit in enumerate(units) if min(unit.positions) < end]
        labels, parts = [units[i].label for i in places], [units[i].part for i in places]
        scores = every[places]
        usable = [i for i, part in enumerate(parts) if part != "template" and scores[i] > 0]
        best = sorted(usable, key=lambda i: -float(scores[i]))[:STRONGEST]
        came = ", ".join(f"{quoted(labels[i])} {scores[i]:+.2f}" for i in best)
        came = html.escape(f"from {came or 'nothing'}")
        output = self.outputs[number]
        text = coloured_text(labels, scores, parts, best, signed=self.signed, most=LONGEST)
        behind = "<br>" * output.count("\n")  # after the token, where the answer itself breaks
        return (
            f'<details name="answer"><summary>{html.escape(in_line(output))}'
            f'<span class="came"> {came}</span></summary><div class="from">'
            f'<p dir="auto"><b>{html.escape(quoted(output))}</b> {came}</p>{text}</div></details>'
            f"{behind}"
        )

    @property
    def _each(self):
        return self.removed[: len(self.strongest)]

    @property
    def _together(self):
        return self.removed[len(self.strongest) :]

    @property
    def _jumps(self):
        """Links to the strongest units of a text that fills more than a screen."""
        if sum(len(unit.label) for unit in self.question.units) <= LONGEST:
            return ""
        links = [f'<a href="#strongest-{i + 1}">{i + 1}</a>' for i in range(len(self.strongest))]
        return f" Jump to {', '.join(links)}."

    @property
    def _legend(self):
        colours = "red speaks for the answer, blue against it" if self.signed else "by how much"
        shown = sum(unit.part not in NOT_WRITTEN for unit in self.question.units)
        part = ", the strongest quarter by rank" if shown > FEW else ""
        which = "the strongest sources" if self.question.sources else "the strongest"
        return f"Coloured by {self.method}{part}: {colours}. Numbers: {which}."


def summarise(
    model: Any,
    question: Question,
    results: Mapping[str, Attribution],
    tested: pd.DataFrame,
) -> Summary:
    """What ``results`` ``{method: Attribution}`` of a question come to, tried on the model.

    ``tested`` is what ``erasure_test`` says of them. The strongest units are taken out of the
    prompt, each by itself and all together, and the probability is read again: as many rows, and
    as many again with a foil.
    """
    method = most_trusted(tested["faithfulness"])
    result = results[method]
    first = {name: written_first(question, some)[:STRONGEST] for name, some in results.items()}
    strongest = first[method]
    groups: list[tuple[int, ...]] = [(unit,) for unit in strongest]
    groups += [tuple(strongest)] if len(strongest) > 1 else []
    whole, *found = probabilities_without(model, question, [(), *groups])
    borne_out, sentences = _trust(question, method, first, found, tested)
    coarse = question.grouping not in FINE and strongest
    outputs, rest = result.outputs, _rest_of_character(model, question)
    if rest and question.foil is None:  # else there are tokens of the foil among them
        ids, before = [*(question.target or ()), *rest], question.input_ids[0].tolist()
        outputs = tuple(token_labels(question.tokenizer, ids, before)[: len(outputs)])
    return Summary(
        character=_character(question, rest),
        inside=_inside(model, question, strongest[0], results) if coarse else None,
        question=question,
        whole=whole,
        method=method,
        scores=result.scores,
        signed=result.signed,
        strongest=tuple(strongest),
        without=tuple(found),
        each=result.each if len(result.outputs) > 1 else None,
        outputs=outputs,
        borne_out=borne_out,
        trust=tuple(sentences),
        top_units={name: [question.units[i].label for i in units] for name, units in first.items()},
    )


def _rest_of_character(model, question):
    """The next tokens of the model that complete the character which the target ends inside of."""
    target, before = list(question.target or ()), question.input_ids[0].tolist()
    if not (question.target_label or "").endswith(BROKEN):
        return []
    ends = {question.tokenizer.eos_token_id}
    more = greedy_answer(model, question.input_ids.new_tensor([before + target]), 3, ends)
    for count in range(1, 1 + len(more)):
        text = decoded(question.tokenizer, target + more[:count], before)
        if not text.endswith(BROKEN):
            return more[:count]
    return []


def _character(question, rest):
    """The character that ``rest``, the tokens after the target, completes; empty without any."""
    if not rest:
        return ""
    before = question.input_ids[0].tolist()
    text = decoded(question.tokenizer, [*(question.target or ()), *rest], before)
    return text[len((question.target_label or "").rstrip(BROKEN)) :][:1]


def _inside(model, question, unit, results):
    """The words of a unit by relevance, the strongest of them tried on the model; a ``Summary``.

    ``results`` may have relevance, whose scores of tokens make those of any units. ``None`` where
    the rules of relevance do not fit the model, or there are no two words.
    """
    inside, words = set(question.units[unit].positions), []
    for word in prompt_units(question.read, "words"):
        own = [place for place in word.positions if place in inside]
        if len(own) == len(word.positions):
            words.append(word)
        elif own:  # a space before the next sentence's first word is a token of some tokenizers
            label = "".join(question.labels[place] for place in own)
            words.append(Unit(label, tuple(own), word.part))
    if METHODS["relevance"].refusal(model) is not None or len(words) < 2:
        return None
    units = [*question.units[:unit], *words, *question.units[unit + 1 :]]
    closer = replace(question, units=units, grouping="words", sources=())
    result = results.get("relevance") or attribute(model, closer, "relevance")
    scores = torch.stack([result.tokens[list(unit.positions)].sum() for unit in units])
    places = range(unit, unit + len(words))
    strongest = sorted(places, key=lambda place: -float(scores[place]))[:STRONGEST]
    whole, *found = probabilities_without(model, closer, [(), *((place,) for place in strongest)])
    return Summary(
        question=closer,
        whole=whole,
        method="relevance",
        scores=scores,
        signed=True,
        strongest=tuple(strongest),
        without=tuple(found),
        borne_out="weak",
        trust=(),
        top_units={},
    )


def default_units(question: Question) -> Question:
    """``question`` in words; one of more than 400 tokens in up to 20 blocks of whole sentences."""
    read, answer = question.read, [unit for unit in question.units if unit.part == "answer"]
    if read is None:
        return question
    if len(question.labels) <= LONG:
        return replace(question, units=prompt_units(read, "words") + answer, grouping="words")
    blocks = joined_units(read, prompt_units(read, "sentences"), BLOCKS)
    return replace(question, units=blocks + answer, grouping="sentences")


def reported(tokens: int) -> tuple[str, ...]:
    """The methods of a report on a prompt of so many tokens, where none are named."""
    return REPORTED if tokens <= LONG else REPORTED_LONG


def explain(
    model: Any, question: Question, methods: Sequence[str] | None = None, seed: int = 0
) -> Summary:
    """What the model relied on for ``question``, by ``methods`` and their test by erasure.

    By default those of ``TRUSTED`` that fit the model; of a long prompt, occlusion and relevance.
    What takes longer than two seconds has a bar: see ``helpers.progress``.
    """
    if not methods:
        usual = [name for name in reported(len(question.labels)) if name in TRUSTED]
        methods = [name for name in usual if METHODS[name].refusal(model) is None]
    with progress("explain"):
        ((question, results),) = attribute_all(model, [question], methods)
        tested = erasure_test(model, question, results, seed)
        return summarise(model, question, results, tested)


def erasure_test(
    model: Any, question: Question, results: Mapping[str, Attribution], seed: int = 0
) -> pd.DataFrame:
    """``against_random`` of the units that a report ranks, the others left in: a DataFrame.

    A template's words, or an answer's own, are nobody's choice, so no order is tested on them.
    """
    ranked = ranked_units(question) or list(range(len(question.units)))
    count, steps = erasure_size(len(ranked), len(question.labels))
    options: dict[str, Any] = {"count": count, "steps": steps, "seed": seed, "among": ranked}
    return against_random(model, question, dict(results), **options)


def show(model: Any, question: Question, methods: Sequence[str] | None = None) -> Summary:
    """Show in a notebook what ``explain`` finds, and return it."""
    found = explain(model, question, methods)
    display(found)
    return found


def most_trusted(faithfulness: Mapping[str, float]) -> str:
    """The method of ``TRUSTED`` that erasing bears out best; of the others where none has run.

    ``faithfulness`` ``{method: nats}`` is that of ``erasure_measures``.
    """
    known = {name: value for name, value in faithfulness.items() if name in TRUSTED}
    known = known or {name: value for name, value in faithfulness.items() if name != "random"}
    known = known or dict(faithfulness)
    order = (*TRUSTED, *sorted(known))
    return max(known, key=lambda name: (round(known[name], 3), -order.index(name)))


def probabilities_without(
    model: Any, question: Question, groups: Sequence[Sequence[int]]
) -> list[Without]:
    """The probability of the target without each group of units, by running the model.

    An empty group takes nothing out.

    What stands in for a unit is what ``occlusion`` puts there by default: see ``blank``.
    """
    kept = torch.ones(len(groups), len(question.units), dtype=torch.bool)
    for row, group in zip(kept, groups, strict=True):
        row[list(group)] = False
    target, foil = question.target or (), question.foil
    compared = [option.ids for option in question.options] or [target]
    some = replace(question, objective="log_probability")
    if foil is not None:  # all that is compared is read in one run
        compared = compared if question.options else [target, foil]
        options = tuple(Option(ids, "") for ids in compared)
        some = replace(some, target=None, foil=None, foil_label=None, options=options)
    with asking(model, [some], each=True) as asked:
        whole, (values,) = coalition_values(asked, [kept])
    each = torch.cat([whole, values]).cpu().double()  # [1 + groups, tokens of all compared]
    each = torch.stack([of.sum(dim=1) for of in each.split(list(map(len, compared)), dim=1)], dim=1)
    asked_for = each[:, compared.index(target)]
    objective = asked_for if foil is None else asked_for - each[:, compared.index(foil)]
    return [
        Without(
            units=tuple(group),
            log_probability=asked_for[row].item(),
            against=None if foil is None else objective[row].sigmoid().item(),
            moved=(objective[0] - objective[row]).item(),
            options=tuple(each[row].tolist()) if question.options else (),
        )
        for row, group in enumerate(groups, start=1)
    ]


def _trust(question, method, first, found, tested):
    """Whether three tests bear the strongest units out, and a sentence for each."""
    if not found:
        return "no", ["Nothing of the prompt was written by anybody, so nothing is ranked."]
    moved, beats = found[-1].moved, tested.loc[method, "beats_random"]
    matters, better = moved > HALVED, beats >= 0.95
    sentences = []
    if not matters:
        sentences.append("Taking these out does not even halve the odds of the answer.")
    few = len(ranked_units(question)) < 3
    share = "every random order" if beats == 1 else f"{100 * beats:.0f}\xa0% of random orders"
    sentences.append(
        f"Erased in the order of {method}, the answer gives way sooner than in {share} tried."
    )
    trusted = [name for name in TRUSTED if name in first]
    name = {some: quoted(question.units[first[some][0]].label) for some in trusted}
    agree = len(set(name.values())) == 1
    if len(trusted) < 2:
        agree = False
        sentences.append("No second method of those that are trusted was run beside it.")
    elif agree:
        sentences.append(f"{', '.join(trusted)} all put {name[trusted[0]]} first.")
    else:
        told = [f"{some} puts {name[some]} first" for some in trusted]
        sentences.append(f"Methods differ: {', '.join(told)}.")
    if not matters:
        return "no", sentences
    return "yes" if (better or few) and agree else "weak", sentences
