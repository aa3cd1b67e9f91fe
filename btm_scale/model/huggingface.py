"""The config.json of a model: what Hugging Face, vLLM and others need to build it."""

from __future__ import annotations

from typing import Any

from btm_scale.errors import CheckpointError
from btm_scale.model.shape import ModelShape


def config_json(shape: ModelShape, *, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """The config of a shape; `dtype` is `bfloat16` or `float32`."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if shape.family == "llama":
        return common | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups,
            "head_dim": shape.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": shape.positions,
            "rms_norm_eps": shape.norm_epsilon,
            "rope_theta": shape.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "attention_bias": False,
            "mlp_bias": False,
        }
    return common | {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": shape.ffn,
        "n_positions": shape.positions,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": shape.norm_epsilon,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def shape_from_config(config: dict[str, Any], path: object) -> ModelShape:
    """The shape that a config.json describes. Raises CheckpointError for what this project can't build."""
    family = config.get("model_type")
    if family == "llama":
        rope = config.get("rope_parameters") or {}
        if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise CheckpointError(
                f"{path}: scaled rotary positions are not supported; use a model without them"
            )
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise CheckpointError(f"{path}: a llama model with biases is not supported")
        heads = config["num_attention_heads"]
        return ModelShape(
            family="llama",
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            groups=config.get("num_key_value_heads") or heads,
            ffn=config["intermediate_size"],
            positions=config["max_position_embeddings"],
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            norm_epsilon=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        )
    if family == "gpt2":
        return ModelShape(
            family="gpt2",
            layers=config["n_layer"],
            hidden=config["n_embd"],
            heads=config["n_head"],
            groups=config["n_head"],
            ffn=config.get("n_inner") or 4 * config["n_embd"],
            positions=config["n_positions"],
            vocabulary=config["vocab_size"],
            norm_epsilon=config["layer_norm_epsilon"],
        )
    raise CheckpointError(f"{path}: model_type '{family}' is not supported; it must be llama or gpt2")
