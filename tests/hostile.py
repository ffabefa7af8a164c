"""Damage a model folder at random and load it: one sentence, or a model that works.

python -P tests/hostile.py SEED COUNT prints what else came of it, a line of JSON for each kind.
"""

import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from transformers.utils import logging as transformers_logging

from helpers import InputError, ask, load_model, tiny_llama
from helpers.models import weights_digest

SECONDS = 30  # that one folder may take
MEMORY = 16 * 2**30  # bytes of addresses, of which torch reserves some that it never uses
VALUES = [None, True, False, 0, -1, 1, 2**31, 10**12, 1.5, float("inf"), "", "x", [], {}, [1]]
VALUES += [["x"], {"a": 1}, "{{ 1 / 0 }}", [[[]]], "{% for i in range(99999) %}x{% endfor %}"]


class Endless(BaseException):
    """The time of one folder is over."""


def places(value, place=()):
    """The path to every value inside of JSON."""
    yield place
    inside = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        inside = list(enumerate(value))[:40]
    for key, each in inside:
        yield from places(each, (*place, key))


def changed(value, place, new):
    if not place:
        return new
    value = value.copy()
    value[place[0]] = changed(value[place[0]], place[1:], new)
    return value


def damage(folder, draw):
    """Change one file of a folder; returns what was done, in words."""
    file = draw.choice(sorted(folder.iterdir()))
    if file.suffix == ".json" and draw.random() < 0.8:
        whole = json.loads(file.read_text())
        place, new = draw.choice(list(places(whole))), draw.choice(VALUES)
        file.write_text(json.dumps(changed(whole, place, new)))
        return f"{file.name} {place} = {new!r}"
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 4, 30])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    if draw.random() < 0.3:
        content = content[: draw.randrange(len(content))]
    file.write_bytes(bytes(content))
    return f"{file.name} as bytes"


def use(folder):
    model, tokenizer = load_model(folder)
    ask(model, tokenizer, "Riga is")
    ask(model, tokenizer, [{"role": "user", "content": "Hi"}])
    weights_digest(folder)


def main(seed, count):
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def over(number, frame):
        raise Endless

    signal.signal(signal.SIGALRM, over)
    draw, told = random.Random(seed), set()
    with tempfile.TemporaryDirectory() as work:
        whole, folder = Path(work, "whole"), Path(work, "folder")
        for part in tiny_llama():
            part.save_pretrained(whole)
        for _ in range(count):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            how = damage(folder, draw)
            signal.alarm(SECONDS)
            try:
                use(folder)
            except InputError as error:
                if "\n" in str(error) or len(str(error)) > 1000:
                    print(json.dumps({"how": how, "sentence": str(error)}))
            except BaseException as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                kind = type(error).__name__, at.filename, at.lineno
                if kind not in told:
                    print(json.dumps({"how": how, "error": repr(error)[:200], "at": kind[1:]}))
                told.add(kind)
            finally:
                signal.alarm(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
