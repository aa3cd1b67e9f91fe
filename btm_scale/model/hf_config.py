"""The config.json of a model: what Hugging Face, vLLM and others need to build it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from btm_scale.errors import CheckpointError
from btm_scale.model.shape import ModelShape, RopeScaling

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
# What transformers takes for a config.json that does not say.
_HEAD_SIZE = {"qwen3": 128}
_WINDOW = 4096


def config_json(shape: ModelShape, *, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """The config of a shape; `dtype` is `bfloat16` or `float32`."""
    common: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if shape.rotary:
        own: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": False, "mlp_bias": False},
            "mistral": {"sliding_window": shape.window},
            "qwen2": {"use_sliding_window": False},
            "qwen3": {"use_sliding_window": False, "attention_bias": False},
        }
        return (
            common
            | own[shape.family]
            | {
                "hidden_size": shape.hidden,
                "intermediate_size": shape.ffn,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.kv_heads,
                "head_dim": shape.head_size,
                "hidden_act": "silu",
                "max_position_embeddings": shape.positions,
                "rms_norm_eps": shape.norm_epsilon,
                "rope_theta": shape.rope_theta,
                "rope_parameters": _rope_parameters(shape),
            }
        )
    return common | {
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


def read_shape(directory: Path) -> ModelShape:
    """The shape of the model in a Hugging Face directory. Raises CheckpointError if it says none that can be built."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory} is no Hugging Face model: {path} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a JSON {type(config).__name__}, and must be an object. Copy it again.")
    return shape_from_config(config, path)


def shape_from_config(config: dict[str, Any], path: object) -> ModelShape:
    """The shape that a config.json describes. Raises CheckpointError for what this project can't build."""
    family = config.get("model_type")
    if family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(f"{path}: model_type '{family}' is not supported; it must be one of {known}")
    if told := _unsupported(config):
        raise CheckpointError(f"{path}: a {family} model with {told} is not supported; use a model without")
    try:
        return ModelShape(**(_gpt2_sizes(config) if family == "gpt2" else _rotary_sizes(config)))
    except KeyError as error:
        raise CheckpointError(f"{path} does not say {error}, which a {family} model needs; copy it again") from error
    except ValidationError as error:
        problems = "; ".join(problem["msg"] for problem in error.errors())
        raise CheckpointError(f"{path} describes no {family} model: {problems}") from error


def _rotary_sizes(config: dict[str, Any]) -> dict[str, Any]:
    family, heads, hidden = config["model_type"], config["num_attention_heads"], config["hidden_size"]
    return {
        "family": family,
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or _HEAD_SIZE.get(family, hidden // heads),
        "ffn": config["intermediate_size"],
        "positions": config["max_position_embeddings"],
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope_theta": _rope(config).get("rope_theta", config.get("rope_theta", 10_000.0)),
        "rope_scaling": _rope_scaling(_rope(config)),
        "window": config.get("sliding_window", _WINDOW) if family == "mistral" else None,
    }


def _gpt2_sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "layers": config["n_layer"],
        "hidden": config["n_embd"],
        "heads": config["n_head"],
        "kv_heads": config["n_head"],
        "ffn": config.get("n_inner") or 4 * config["n_embd"],
        "positions": config["n_positions"],
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", True),
        "norm_epsilon": config["layer_norm_epsilon"],
    }


def _unsupported(config: dict[str, Any]) -> str | None:
    """The first setting of a config that changes what the weights mean, and that our model does not have."""
    rope = _rope(config)
    problems = {
        f"{_rope_kind(rope)} rotary positions": _rope_kind(rope) not in ("default", "linear", "llama3"),
        "partly rotary heads": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1,
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "windows in some layers": config.get("use_sliding_window", False),
        f"activation {config.get('hidden_act')}": config.get("hidden_act", "silu") not in ("silu", "swish"),
        f"activation {config.get('activation_function')}": config.get("activation_function", "gelu_new")
        not in ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx", False),
        "unscaled attention": not config.get("scale_attn_weights", True),
        "cross attention": config.get("add_cross_attention", False),
    }
    return next((told for told, applies in problems.items() if applies), None)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings, in the form of today or of before transformers 5."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _rope_kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = _rope_kind(rope)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope["factor"],
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            original=rope["original_max_position_embeddings"],
        )
    return None


def _rope_parameters(shape: ModelShape) -> dict[str, Any]:
    scaling = shape.rope_scaling
    result: dict[str, Any] = {
        "rope_type": scaling.kind if scaling else "default",
        "rope_theta": shape.rope_theta,
    }
    if scaling:
        result["factor"] = scaling.factor
    if scaling and scaling.kind == "llama3":
        result |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
        }
    return result
