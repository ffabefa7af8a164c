"""Small models of many families, and what is promised of each."""

import torch
import transformers
from toys import GROUPED

PHI3 = {"pad_token_id": 0, "sliding_window": None}
# Families whose layers are a Llama's, or nearly: what to add to the shape.
LIKE_LLAMA = {
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Granite": {"attention_multiplier": 8**-0.5},
    "Phi3": PHI3,
    "SmolLM3": {"no_rope_layers": [1, 1], "pad_token_id": 0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Others that take every method.
OTHERS = {
    "Qwen3": {"head_dim": 8},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 64},
    "Gemma3": {"head_dim": 8},
    "Olmo": {},
    "Olmo2": {},
    "Cohere": {},
    "Llama4": {
        "num_local_experts": 2,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
    },
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "Qwen3Moe": EXPERTS | {"head_dim": 8},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoX": {},
    "Phi": {},
    "Starcoder2": {},
}
WITH_RULES = {"Llama": {}} | LIKE_LLAMA | OTHERS
# And those for which there are no rules, with what is said.
REFUSED = {
    "GptOss": (
        {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2},
        "no rule for the GptOssExperts of a GptOssForCausalLM",
    ),
    "Falcon": ({}, "The attention of a FalconForCausalLM is its own"),
    "Bloom": ({"n_layer": 2, "n_head": 4}, "The attention of a BloomForCausalLM is its own"),
    "Mamba": ({}, "no rule for the Conv1d of a MambaForCausalLM"),
}


def of_family(name, more, tokenizer):
    """A small frozen model of a family, drawn at random, biases and gains too."""
    text = getattr(transformers, f"{name}TextConfig", None)  # of a family that sees, too
    config = text or getattr(transformers, f"{name}Config")
    cls = getattr(transformers, f"{name}ForCausalLM", None) or transformers.GPT2LMHeadModel
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config(**(GROUPED | tokens | more)))
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)
    return model.requires_grad_(False).eval()
