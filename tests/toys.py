"""Tiny models of other architectures than Llama, for what must not depend on the architecture."""

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
OTHERS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SHAPE),
    "a sliding window": (MistralForCausalLM, MistralConfig, GROUPED | {"sliding_window": 5}),
    "a cap on logits": (
        Gemma2ForCausalLM,
        Gemma2Config,
        GROUPED | {"head_dim": 8, "sliding_window": 64, "final_logit_softcapping": 2.0},
    ),
    "scaled embeddings": (Gemma3ForCausalLM, Gemma3TextConfig, GROUPED | {"head_dim": 8}),
    "attention sinks": (
        GptOssForCausalLM,
        GptOssConfig,
        GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "scaled logits": (GraniteForCausalLM, GraniteConfig, GROUPED | {"logits_scaling": 3.0}),
    "logits times a number": (CohereForCausalLM, CohereConfig, GROUPED | {"logit_scale": 0.5}),
}


def toy(name, tokenizer):
    """A frozen model of ``OTHERS`` for the toy's tokenizer."""
    cls, config, shape = OTHERS[name]
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config(**shape, **tokens))
    return model.requires_grad_(False).eval()
