"""Many prompts in one pass give what each gives alone, whatever is beside them."""

import time
from dataclasses import replace

import pytest
import torch
from linear_model import LinearCausalModel
from running import few
from toys import OTHERS, toy
from watching import rows_run

from helpers import METHODS, InputError, ask, attribute, attribute_all, load_model, tiny_llama
from helpers.attribution import engine
from helpers.questions import read_question

VARIANTS = {
    "plain": {},
    "one key-value head": {"key_value_heads": 1},
    "as many key-value heads as queries": {"key_value_heads": 4},
    "tied embeddings": {"tie_word_embeddings": True},
}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Riga?"}]
# several lengths, alone and together; a token alone; target and foil of one token and of several,
# in one text and in two; whole answers; the chat; units of every kind
ENTRIES = [
    {"prompt": "a"},
    {"prompt": "b", "target": "c", "foil": "d"},
    {"prompt": "Riga is in", "foil": "b"},
    {"prompt": "Oslo is in"},
    {"prompt": "Rome is in", "target": "L", "foil": "N"},
    {"prompt": "Oslo is on", "target": "Le", "foil": "Norw"},
    {"prompt": "Rome is on", "target": "Le", "foil": "Norw"},
    {"prompt": "Bonn is in", "target": "very n", "foil": "very p"},
    {"prompt": "Bern is in", "target": "very no", "foil": "very yes"},
    {"prompt": "Kiew is in", "answer": "a land"},
    {"prompt": "Kiev is in", "answer": "a lane", "units": "words"},
    {"prompt": "Kyiv is in", "answer": "a line", "units": "words"},
    {"prompt": "The keys to the cabinet", "target": "a"},
    {"prompt": "a long prompt " * 5},
    {"prompt": "It is. It was. Is it", "units": "sentences", "foil": "b"},
    {"prompt": "It is. It was! It's ", "units": "words", "foil": "b"},
    {"prompt": "It was. It is. It's ", "units": "sentences", "foil": "b"},
    {"prompt": "Hi", "chat": True, "foil": "b"},
    {"prompt": "Ho", "chat": True},
    {"prompt": TALK, "target": "Yes", "foil": "No", "units": "turns"},
    {"prompt": "Oslo is at", "objective": "logit"},
    {"prompt": "Rome is at", "target": "ab", "objective": "logit"},
    {"prompt": "你好 🙂"},
]
REAL = [
    {"prompt": "The capital city of Latvia is", "target": " Riga", "foil": " Tallinn"},
    {"prompt": "The keys to the old wooden cabinet", "foil": " is"},
    {"prompt": "Hi", "chat": True, "target": "Hello there"},
]
ONE_PASS = ["saliency", "gradient_x_input", "attention", "attention_rollout", "relevance"]
CHEAP = [*ONE_PASS, "occlusion", "random"]


def read(model, tokenizer, entry):
    """A question that is as open as ``entry`` leaves it: the model has not been run."""
    return read_question(tokenizer, **entry, model=model)


def same(found, single):
    """Equal to 1e-4 of the prompt's largest score, and with the same evidence."""
    largest = float(single.scores.abs().max())
    assert (found.scores - single.scores).abs().max() <= 1e-4 * max(largest, 1e-2)
    assert found.scores.dtype == torch.float32 and found.method == single.method
    for name in ("units", "outputs", "evaluations", "forwards", "signed", "closed"):
        assert getattr(found, name) == getattr(single, name), name
    assert found.gap == (None if single.gap is None else pytest.approx(single.gap, abs=1e-3))
    assert (found.each is None) == (single.each is None)
    if found.each is not None:
        assert (found.each - single.each).abs().max() <= 1e-4 * float(single.each.abs().max())


def same_question(found, alone):
    for name in ("target", "foil", "target_label", "answer", "units", "top", "rank", "notes"):
        assert getattr(found, name) == getattr(alone, name), name
    for name in ("probability", "top_probability"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-4), name


def left_as_found(model, run):
    """Run, and see that weights, output layer, hooks and attention are what they were."""
    head, weights = model.get_output_embeddings(), list(model.parameters())
    wanted = [weight.requires_grad for weight in weights]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    try:
        return run()
    finally:
        assert model.get_output_embeddings() is head
        assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
        assert [weight.requires_grad for weight in weights] == wanted
        now = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert now == hooks
        assert model.config._attn_implementation == "sdpa"


def run_all(model, questions, methods, **options):
    return left_as_found(model, lambda: list(attribute_all(model, questions, methods, **options)))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_of_many_are_those_of_each(variant, each):
    model, tokenizer = tiny_llama(**VARIANTS[variant])
    model.requires_grad_(True)
    questions = [read(model, tokenizer, entry) for entry in ENTRIES]
    found = run_all(model, questions, CHEAP, each=each)
    for entry, (question, results) in zip(ENTRIES, found, strict=True):
        assert list(results) == CHEAP
        alone = ask(model, tokenizer, **entry)
        same_question(question, alone)
        for method in CHEAP:
            same(results[method], attribute(model, alone, method, each=each))


@pytest.mark.thorough
def test_scores_of_many_are_those_of_each_on_the_bundled_model(bundled):
    model, tokenizer = bundled
    questions = [read(model, tokenizer, entry) for entry in REAL]
    for entry, (question, results) in zip(
        REAL, run_all(model, questions, [*ONE_PASS, "alti_logit"]), strict=True
    ):
        alone = ask(model, tokenizer, **entry)
        same_question(question, alone)
        for method, result in results.items():
            same(result, attribute(model, alone, method))


def test_every_method_runs_and_is_the_single_one(tiny):
    model, tokenizer = tiny
    entries = [ENTRIES[place] for place in (2, 3, 5, 6, 10, 11)]
    questions = [read(model, tokenizer, entry) for entry in entries]
    for question, results in attribute_all(model, questions, METHODS):
        assert set(results) == set(METHODS)
        for method, result in results.items():
            same(result, attribute(model, question, method))


def test_options_go_to_their_method(tiny):
    model, question = tiny[0], ask(*tiny, "Riga is in", foil="b")
    given = {"occlusion": {"replacement": "eos"}, "random": {"seed": 3}, "saliency": {}}
    ((_, results),) = attribute_all(model, [question], given)
    for method, options in given.items():
        same(results[method], attribute(model, question, method, **options))


@pytest.mark.parametrize(
    "method", ["random", "attention", "saliency", "occlusion", "alti_logit", "relevance", None]
)
@pytest.mark.parametrize("options", [{}, {"foil": "b"}, {"target": "ab", "foil": "cd"}], ids=str)
def test_the_next_token_and_its_probability_are_the_models(tiny, method, options):
    model, tokenizer = tiny
    texts = ["Riga is in", "Oslo is in", "The keys", "a"]
    questions = [read(model, tokenizer, {"prompt": text} | options) for text in texts]
    wanted = [method] if method else []
    for text, (question, results) in zip(
        texts, attribute_all(model, questions, wanted), strict=True
    ):
        with torch.no_grad():
            ids = torch.cat([question.input_ids, torch.tensor([question.target[:-1]]).long()], 1)
            odds = model(ids).logits[0, -len(question.target) :].softmax(dim=-1)
        assert question.top == int(odds[0].argmax()) and set(results) == set(wanted)
        assert options.get("target") or question.target == (question.top,)
        assert question.top_probability == pytest.approx(float(odds[0].max()), rel=1e-4)
        whole = odds[range(len(odds)), list(question.target)].prod()
        assert question.probability == pytest.approx(float(whole), rel=1e-4)
        same_question(question, ask(model, tokenizer, text, **options))


@pytest.mark.parametrize("options", [{}, {"foil": "b"}, {"target": "ab"}, {"foil": "cd"}], ids=str)
@pytest.mark.parametrize(
    "methods, gradients, forwards",
    [
        # all go back from one; the other row says where relevance is counted from
        (["saliency", "gradient_x_input", "random", "relevance"], 1, 1),
        (["saliency"], 1, 0),
        (["attention"], 0, 1),
        (["occlusion"], 0, 11),
        ([], 0, 1),
    ],
)
def test_no_pass_is_run_only_to_find_the_next_token(tiny, options, methods, gradients, forwards):
    model, tokenizer = tiny
    texts = ["Riga is in", "Oslo is in", "Rome is in"]
    questions = [read(model, tokenizer, {"prompt": text} | options) for text in texts]
    found, *rows = rows_run(model, lambda: list(attribute_all(model, questions, methods)))
    if options.get("target") and "occlusion" in methods:
        forwards += 1  # the answer's first token is a unit too
    assert rows == [3 * gradients, 3 * forwards]
    assert all(question.probability for question, _ in found)


def test_a_foil_that_is_the_models_own_token_leaves_nothing_to_compare(tiny):
    model, tokenizer = tiny
    own = ask(model, tokenizer, "Riga is in").target
    entries = [{"prompt": "Riga is in", "foil_ids": own}, {"prompt": "Oslo is in", "foil": "b"}]
    questions = [read(model, tokenizer, entry) for entry in entries]
    (first, nothing), (second, results) = attribute_all(model, questions, ["saliency", "shapley"])
    assert first.target is None and first.probability is None and nothing == {}
    assert second.target == ask(model, tokenizer, "Oslo is in").target
    assert set(results) == {"saliency", "shapley"}
    with pytest.raises(InputError, match="nothing to compare"):
        attribute(model, questions[0], "saliency")


@pytest.mark.parametrize("method", CHEAP)
def test_neither_order_nor_batch_size_matters(tiny, method, monkeypatch):
    model, tokenizer = tiny
    questions = [read(model, tokenizer, entry) for entry in ENTRIES * 2]

    def run(questions):
        return [results[method] for _, results in attribute_all(model, questions, [method])]

    expected = run(questions)
    others = [run(questions[::-1])[::-1]]
    monkeypatch.setattr("helpers.attribution.engine.token_budget", lambda model: 40)
    others.append(run(questions))
    monkeypatch.setattr("helpers.attribution.HELD", 3)
    others.append(run(questions))
    monkeypatch.undo()
    monkeypatch.setattr("helpers.attribution.engine.FULL_PASS", 10_000)  # variants together
    others.append(run(questions))
    monkeypatch.setitem(engine.LOGITS_AT_ONCE, "cpu", 1)  # one row at a time
    others.append(run(questions))
    for results in others:
        for found, known in zip(results, expected, strict=True):
            same(found, known)


def test_questions_are_taken_as_they_come(tiny, monkeypatch):
    """Some thousand are held, not all: a stream that never ends is answered too."""
    monkeypatch.setattr("helpers.attribution.HELD", 4)
    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield read(*tiny, {"prompt": "ab"})

    stream = attribute_all(tiny[0], endless(), ["saliency"])
    for _ in range(6):
        next(stream)
    assert len(drawn) == 8


def test_a_batch_that_does_not_fit_is_halved(tiny):
    model, tokenizer = tiny
    questions = [read(model, tokenizer, ENTRIES[3])] * 8
    sizes = []

    def refuse(module, args, named):
        sizes.append(len(named["inputs_embeds"]))
        if sizes[-1] > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        answers = run_all(model, questions, ["saliency"])
    finally:
        handle.remove()
    assert sizes == [8, 4, 2, 2, 2, 2] and len(answers) == 8


@pytest.mark.parametrize(
    "methods",
    [["saliency", "relevance"], *([name] for name in METHODS if name != "random")],
    ids=" and ".join,
)
def test_the_model_is_left_as_it_was_after_an_error_in_the_middle(tiny, methods):
    model, tokenizer = tiny
    questions = [ask(model, tokenizer, **entry) for entry in ENTRIES[:8]]

    def fail(module, args):
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            run_all(model, questions, methods, precision="bfloat16")
    finally:
        handle.remove()


def test_seconds_add_up_to_the_time_that_was_spent(tiny):
    """Shared, not counted twice: the three that one forward pass gave have a third each."""
    questions = [read(*tiny, entry) for entry in ENTRIES]
    began = time.perf_counter()
    answers = run_all(tiny[0], questions, ["saliency", "gradient_x_input", "relevance"])
    took = time.perf_counter() - began
    seconds = [[result.seconds for result in results.values()] for _, results in answers]
    assert 0 < sum(map(sum, seconds)) < took
    assert all(first == second == third > 0 for first, second, third in seconds)


def test_bfloat16_runs_and_is_near(tiny_folder):
    model, tokenizer = load_model(str(tiny_folder), dtype="bfloat16")
    questions = [read(model, tokenizer, entry) for entry in ENTRIES]
    exact_model, _ = load_model(str(tiny_folder))
    for question, results in run_all(model, questions, CHEAP):
        single = attribute(exact_model, question, "saliency")
        near = results["saliency"].scores
        assert all(result.scores.isfinite().all() for result in results.values())
        assert (near - single.scores).abs().max() <= 0.2 * single.scores.abs().max()


def test_a_model_without_an_output_layer_takes_many_too(tiny):
    model = LinearCausalModel(tiny[1])
    entries = [ENTRIES[place] for place in (2, 3, 4, 5, 6, 7)]
    questions = [read(model, tiny[1], entry) for entry in entries]
    for entry, (question, results) in zip(
        entries, attribute_all(model, questions, ["saliency", "occlusion"]), strict=True
    ):
        same_question(question, ask(model, tiny[1], **entry))
        for method, result in results.items():
            same(result, attribute(model, question, method))
    known = read(model, tiny[1], {"prompt": "Rome is in", "target": "L", "foil": "N"})
    ((found, results),) = attribute_all(model, [known], ["occlusion"])
    assert (results["occlusion"].scores - model.known_scores(found)).abs().max() < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_take_many_too(tiny, name):
    model = toy(name, tiny[1])
    entries = few([entry for entry in ENTRIES if entry["prompt"] != TALK], 11)
    questions = [read(model, tiny[1], entry) for entry in entries]
    methods = ["saliency", "occlusion", "shapley"]
    found = list(attribute_all(model, questions, methods, budget=10_000))
    for entry, (question, results) in zip(entries, found, strict=True):
        same_question(question, ask(model, tiny[1], **entry))
        for method, result in results.items():
            same(result, attribute(model, question, method, budget=10_000))


@pytest.mark.parametrize("method", ["relevance", "alti_logit", "astrology"])
def test_what_a_model_does_not_support_is_refused_before_anything_is_run(tiny, method):
    model = LinearCausalModel(tiny[1])
    questions = [read(model, tiny[1], {"prompt": "Riga is in"})]

    def refused():
        with pytest.raises(
            InputError, match=r"no layers that are known|its own|There is no method 'astrology'"
        ):
            list(attribute_all(model, questions, ["saliency", "occlusion", method]))

    _, gradients, forwards = rows_run(model, refused)
    assert (gradients, forwards) == (0, 0)


def test_no_question_is_no_answer(tiny):
    assert list(attribute_all(tiny[0], [], ["saliency"])) == []
    question = read(*tiny, {"prompt": "Riga is in"})
    ((found, results),) = attribute_all(tiny[0], [question], ())
    assert results == {} and found.target == ask(*tiny, "Riga is in").target
    assert replace(found, input_ids=question.input_ids).labels == question.labels
