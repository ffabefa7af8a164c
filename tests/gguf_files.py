"""Small .gguf files, written as llama.cpp's converter writes them."""

import json
import re
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants


def write_gguf(path, model, tokenizer, kind="F32", pre="gpt-2", without=(), more=(), **metadata):
    """A Llama and its tokenizer in one file; returns its path.

    ``kind`` names the quantisation of its matrices, ``pre`` the rule by which texts are cut into
    words. ``without`` names tensors that are left out, ``more`` holds others, and ``metadata`` more
    entries, for which ``__`` stands for a dot.
    """
    config, vocabulary = model.config, tokenizer.get_vocab()
    writer = GGUFWriter(path, "llama")
    writer.add_name("toy")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    special, state = (
        set(tokenizer.all_special_ids),
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_token_list(tokens)
    if state["model"]["byte_fallback"]:  # SentencePiece: no merges, but a score for each token
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        kinds = [6 if re.fullmatch("<0x..>", token) else 1 for token in tokens]
    else:
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
        kinds = [1] * len(tokens)
    writer.add_token_types([3 if i in special else kind for i, kind in enumerate(kinds)])
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add = writer.add_uint32 if isinstance(value, int) else add
        add = writer.add_bool if isinstance(value, bool) else add
        add(key.replace("__", "."), value)
    for name, tensor in dict(more).items():
        writer.add_tensor(name, tensor)
    for name, tensor in tensors_of(model).items():
        if name in without:
            continue
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            quantisation = GGMLQuantizationType[kind]
            writer.add_tensor(name, quants.quantize(tensor, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def tensors_of(model):
    """A Llama's weights by their names in a .gguf file, as float32 arrays."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    found = {}
    for name, weight in model.named_parameters():
        array = weight.detach().float().numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        for part, count in heads.items():
            if part in name:  # llama.cpp turns neighbours, where transformers turns halves
                halves = array.reshape(getattr(model.config, count), 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        place = names.get_name(name, try_suffixes=(".weight",))
        found[place] = np.ascontiguousarray(array)
    return found


def as_stored(model, kind):
    """``model`` with its matrices as a quantisation stores them, in place."""
    quantisation = GGMLQuantizationType[kind]
    for weight in model.parameters():
        if weight.dim() == 2:
            array = weight.detach().numpy()
            stored = quants.dequantize(quants.quantize(array, quantisation), quantisation)
            weight.data.copy_(weight.new_tensor(stored))
    return model
