"""Damage a model folder or a .gguf file at random and load it: one sentence, or a model that works.

python -P tests/hostile.py SEED COUNT folder (or gguf) prints what else came of it, a line of JSON
for each kind, and at the end how many loaded.
"""

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from gguf import GGUFReader
from transformers.utils import logging as transformers_logging

from helpers import InputError, ask, load_model, tiny_llama
from helpers.models import weights_digest

sys.path.append(str(Path(__file__).parent))  # -P left it out: its folder helpers is no package
from gguf_files import write_gguf
from small_tokenizers import gpt2

SECONDS = 30  # that one folder may take
MEMORY = 16 * 2**30  # bytes of addresses, of which torch reserves some that it never uses
RESIDENT = 4 * 2**30  # bytes that may ever be in use at once
NUMBERS = [0, 1, 2, 7, 8, 9, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
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


def parts_of(file):
    """Where each field of a .gguf file's header has its parts: [[(place, bytes), …], …]."""
    reader = GGUFReader(file)
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    fields += [tensor.field for tensor in reader.tensors]
    found = [[(4, 4)], [(8, 8)], [(16, 8)]]  # version, number of tensors and of fields
    for field in fields:
        places, place = [], field.offset
        for part in field.parts:
            places.append((place, part.nbytes))
            place += part.nbytes
        found.append(places[:40])
    return found, reader.data_offset


def damage_gguf(file, parts, header, draw):
    """Change one .gguf file; returns what was done, in words."""
    content, how = bytearray(file.read_bytes()), draw.random()
    if how < 0.6:
        place, size = draw.choice(draw.choice(parts))
        number = draw.choice(NUMBERS).to_bytes(8, "little")
        content[place : place + size] = (number * (size // 8 + 1))[:size]
        done = f"bytes {place} to {place + size} = {number!r}"
    else:
        end = header if how < 0.9 else len(content)
        for _ in range(draw.choice([1, 4, 30])):
            content[draw.randrange(end)] = draw.randrange(256)
        done = f"bytes before {end}"
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content))]
        done += ", cut short"
    file.write_bytes(bytes(content))
    return done


def use(folder):
    model, tokenizer = load_model(folder)
    ask(model, tokenizer, "Riga is")
    ask(model, tokenizer, [{"role": "user", "content": "Hi"}])
    weights_digest(folder)


def main(seed, count, kind="folder"):
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def over(number, frame):
        raise Endless

    signal.signal(signal.SIGALRM, over)
    draw, told, loaded = random.Random(int(seed)), set(), 0
    with tempfile.TemporaryDirectory() as work:
        whole, folder, cache = Path(work, "whole"), Path(work, "folder"), Path(work, "cache")
        os.environ["LLAMA_NOTEBOOKS_CACHE"] = str(cache)
        whole.mkdir()
        model, tokenizer = tiny_llama()
        if kind == "gguf":
            tokenizer = gpt2()
            tokenizer.chat_template = tiny_llama()[1].chat_template
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            file = write_gguf(whole / "toy.gguf", model, tokenizer, "Q8_0")
            parts, header = parts_of(file)
        else:
            for part in (model, tokenizer):
                part.save_pretrained(whole)
        for _ in range(int(count)):
            for old in (folder, cache):
                shutil.rmtree(old, ignore_errors=True)
            shutil.copytree(whole, folder)
            if kind == "gguf":
                how = damage_gguf(folder / "toy.gguf", parts, header, draw)
            else:
                how = damage(folder, draw)
            signal.alarm(SECONDS)
            try:
                use(folder / "toy.gguf" if kind == "gguf" else folder)
                loaded += 1
            except InputError as error:
                if "\n" in str(error) or len(str(error)) > 1000:
                    print(json.dumps({"how": how, "sentence": str(error)}))
            except BaseException as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                fault = type(error).__name__, at.filename, at.lineno
                if fault not in told:
                    print(json.dumps({"how": how, "error": repr(error)[:200], "at": fault[1:]}))
                told.add(fault)
            finally:
                signal.alarm(0)
            if strange := {each.name for each in Path(work).iterdir()} - {
                "whole",
                "folder",
                "cache",
            }:
                print(json.dumps({"how": how, "outside": sorted(strange)}))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if used > RESIDENT:
        print(json.dumps({"bytes": used}))
    print(f"{loaded} of {count} loaded, {used / 2**20:.0f} MiB at most")


if __name__ == "__main__":
    main(*sys.argv[1:])
