"""Llama and related families: RMS norm, rotary positions, an MLP gated by SiLU, and Llama's tensor names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from btm_scale.model.families.family import Config, Entry, Family

if TYPE_CHECKING:
    from btm_scale.model.shape import ModelShape

# The defaults of transformers.
_QWEN3_HEAD_SIZE = 128
_MISTRAL_WINDOW = 4096


def from_config(config: Config, head_size: int | None = None) -> dict[str, Any]:
    """Return the fields of a shape; `head_size` is the family's default, otherwise hidden / heads."""
    heads, hidden, rope = config["num_attention_heads"], config["hidden_size"], _rope(config)
    return {
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or head_size or hidden // heads,
        "ffn": config["intermediate_size"],
        "positions": config["max_position_embeddings"],
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "rope_scaling": _rope_scaling(rope, config["max_position_embeddings"]),
    }


def to_config(shape: ModelShape) -> dict[str, Any]:
    """Return the sizes and rotary settings in config.json."""
    return {
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


def unsupported(config: Config) -> dict[str, bool]:
    """Return the settings that are not implemented, and whether the config uses them."""
    rope = _rope(config)
    return {
        f"{_rope_kind(rope)} rotary positions": _rope_kind(rope) not in ("default", "linear", "llama3", "yarn"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)) != 1,
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "use_sliding_window": config.get("use_sliding_window", False),
        f"activation {config.get('hidden_act')}": config.get("hidden_act", "silu") not in ("silu", "swish"),
    }


def mlp_tensors(shape: ModelShape, ours: str, theirs: str) -> Iterator[Entry]:
    """Yield the tensors of a layer's MLP, given the prefixes of the layer's names."""
    mlp = theirs + "mlp."
    yield Entry(ours + "mlp.linear_fc1.weight", (mlp + "gate_proj.weight", mlp + "up_proj.weight"), "gate_up", 0)
    yield Entry(ours + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",), cut=1)


def tensors(shape: ModelShape, mlp: Callable[[ModelShape, str, str], Iterator[Entry]] = mlp_tensors) -> Iterator[Entry]:
    """Yield every tensor, in layer order."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", 0)
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention = theirs + "self_attn."
        yield Entry(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",))
        heads = tuple(f"{attention}{part}_proj.weight" for part in "qkv")
        yield Entry(ours + "self_attention.linear_qkv.weight", heads, "query_key_value", 0)
        if shape.query_key_value_bias:
            biases = tuple(f"{attention}{part}_proj.bias" for part in "qkv")
            yield Entry(ours + "self_attention.linear_qkv.bias", biases, "query_key_value", 0)
        for part in "qk" if shape.head_norms else "":
            norm = f"{ours}self_attention.{part}_layernorm.weight"
            yield Entry(norm, (f"{attention}{part}_norm.weight",))
        yield Entry(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), cut=1)
        yield Entry(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",))
        yield from mlp(shape, ours, theirs)
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not shape.tied:
        yield Entry("output_layer.weight", ("lm_head.weight",), "vocabulary", 0)


def _rope(config: Config) -> dict[str, Any]:
    """Return the rotary settings, also in the format before transformers 5."""
    return {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}


def _rope_kind(rope: Config) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling(rope: Config, positions: int) -> dict[str, Any] | None:
    """Return the fields of RopeScaling."""
    kind = _rope_kind(rope)
    if kind == "linear":
        return {"kind": "linear", "factor": rope["factor"]}
    if kind == "llama3":
        return {
            "kind": "llama3",
            "factor": rope["factor"],
            "low": rope["low_freq_factor"],
            "high": rope["high_freq_factor"],
            "original": rope["original_max_position_embeddings"],
        }
    if kind == "yarn":
        factor = rope["factor"]
        return {
            "kind": "yarn",
            "factor": factor,
            "low": rope.get("beta_slow") or 1,
            "high": rope.get("beta_fast") or 32,
            "original": rope.get("original_max_position_embeddings") or positions,
            "attention": _yarn_attention(rope, factor),
            "truncate": rope.get("truncate", True),
        }
    return None


def yarn_attention(factor: float, weight: float = 1.0) -> float:
    """Return the factor by which YaRN multiplies queries and keys (arXiv 2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(rope: Config, factor: float) -> float:
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    weight, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if weight and of_all:
        return yarn_attention(factor, weight) / yarn_attention(factor, of_all)
    return yarn_attention(factor)


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
    if scaling and scaling.kind == "yarn":
        result |= {
            "beta_slow": scaling.low,
            "beta_fast": scaling.high,
            "attention_factor": scaling.attention,
            "truncate": scaling.truncate,
            "original_max_position_embeddings": scaling.original,
        }
    return result


LLAMA = Family(  # arXiv 2302.13971
    name="llama",
    architecture="LlamaForCausalLM",
    from_config=from_config,
    to_config=lambda shape: {"attention_bias": False, "mlp_bias": False} | to_config(shape),
    tensors=tensors,
    unsupported=unsupported,
)
MISTRAL = Family(  # arXiv 2310.06825
    name="mistral",
    architecture="MistralForCausalLM",
    from_config=lambda config: from_config(config) | {"window": config.get("sliding_window", _MISTRAL_WINDOW)},
    to_config=lambda shape: {"sliding_window": shape.window} | to_config(shape),
    tensors=tensors,
    unsupported=unsupported,
    windowed=True,
)
QWEN2 = Family(  # arXiv 2407.10671
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    from_config=from_config,
    to_config=lambda shape: {"use_sliding_window": False} | to_config(shape),
    tensors=tensors,
    unsupported=unsupported,
    query_key_value_bias=True,
)
QWEN3 = Family(  # arXiv 2505.09388
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    from_config=lambda config: from_config(config, head_size=_QWEN3_HEAD_SIZE),
    to_config=lambda shape: {"use_sliding_window": False, "attention_bias": False} | to_config(shape),
    tensors=tensors,
    unsupported=unsupported,
    head_norms=True,
)
