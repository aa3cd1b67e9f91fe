"""Small random models of the families that transformers computes, written by its own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 65
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_WINDOW = {"sliding_window": 5}
_CAPS = {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0}
# Small enough for soft caps and windows to change every number.
FAMILIES: dict[str, dict[str, Any]] = {
    "olmo2": _GROUPED,
    "olmo3": _GROUPED | _WINDOW,
    "gemma2": _GROUPED | _WINDOW | _CAPS | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | _WINDOW | _CAPS | {"head_dim": 8},
    "phi3": _GROUPED | _WINDOW,
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "gpt_neox": _SIZES | {"rotary_pct": 0.5},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "qwen2_moe": _GROUPED
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    # A family that Megatron-core computes, with a setting that it does not.
    "llama": _GROUPED | {"attention_bias": True},
    # Families whose tensors this package does not know: a scale of the logits, and no KV cache.
    "granite": _GROUPED | {"logits_scaling": 4.0},
    "mamba2": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
}


def write_family(folder: Path, family: str, **changes: Any) -> Any:
    """Write a random float32 model of `family` and return it, as transformers has it in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **FAMILIES.get(family, _SIZES) | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # otherwise biases are 0 and norm weights 1, which hides bugs
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return model
