"""Read and write config.json, from which Hugging Face, vLLM and others build a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from btm_scale.errors import CheckpointError, UnsupportedModelError
from btm_scale.model.families import FAMILIES, READABLE
from btm_scale.model.shape import ModelShape
from btm_scale.util.bounded_json import parse_json, read_bounded, shown
from btm_scale.util.inside import file_inside

_AS_EXPERT = "Other models join a forest as experts, which transformers scores: btm-scale forest add RUN DIR"


def config_json(shape: ModelShape, *, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """Return the config.json of a shape; `dtype` is `bfloat16` or `float32`."""
    return {
        "architectures": [shape.traits.architecture],
        "model_type": shape.family,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        "use_cache": True,
    } | shape.traits.to_config(shape)


def read_shape(directory: Path) -> ModelShape:
    """Return the shape of the model in a Hugging Face directory.

    Raises `UnsupportedModelError` if Megatron-core does not compute it here, `CheckpointError` if it cannot be read.
    """
    shape = shape_from_config(read_config(directory), directory / "config.json")
    require_no_adapter(directory)
    return shape


def require_no_adapter(directory: Path) -> None:
    """Raise `CheckpointError` if a directory holds an adapter, for which transformers may load a base elsewhere."""
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} holds an adapter, whose base model may be anywhere. Merge the adapter into its base first."
        )


def read_config(directory: Path) -> dict[str, Any]:
    """Return the config.json of a Hugging Face directory. Raises `CheckpointError` if it cannot be read."""
    path = file_inside(directory, "config.json")
    try:
        config = parse_json(read_bounded(path))
    except FileNotFoundError:
        if not directory.exists():
            raise CheckpointError(
                f"{directory} does not exist. Train the model, or give the path of an existing Hugging Face directory."
            ) from None
        raise CheckpointError(
            f"{directory} is not a model: it has no config.json. Train it, or choose another model."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{directory} is not a Hugging Face model: {path} cannot be read ({error}). Copy it again."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{directory} is not a Hugging Face model: {path} is {error}. Copy it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a JSON {type(config).__name__}, but must be an object. Copy it again.")
    _require_types(config, path, {"model_type": _TYPES["model_type"]})
    if config.get("model_type") in READABLE:
        _require_types(config, path, _TYPES)
        for section in ("rope_scaling", "rope_parameters"):
            _require_types(config.get(section) or {}, path, _TYPES, f"{section}.")
    return config


_Types = dict[str, tuple[str, Callable[[Any], bool]]]


def _require_types(config: dict[str, Any], path: Path, types: _Types, section: str = "") -> None:
    """Raise `CheckpointError` for a setting that this package uses and that has a wrong type."""
    for key, (rule, holds) in types.items():
        value = config.get(key)
        if value is not None and not holds(value):
            raise CheckpointError(f"{path}: '{section}{key}' must be {rule} and is {shown(value)}. Copy it again.")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_section(value: Any) -> bool:
    return isinstance(value, dict)


_SIZES = (
    "num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size head_dim vocab_size "
    "max_position_embeddings n_layer n_head n_embd n_inner n_positions sliding_window original_max_position_embeddings "
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step"
)
_NUMBERS = (
    "rms_norm_eps layer_norm_epsilon rope_theta factor low_freq_factor high_freq_factor partial_rotary_factor "
    "beta_slow beta_fast attention_factor mscale mscale_all_dim"
)
_FLAGS = (
    "tie_word_embeddings attention_bias mlp_bias use_sliding_window add_cross_attention "
    "scale_attn_by_inverse_layer_idx scale_attn_weights norm_topk_prob truncate"
)
_TYPES: _Types = (
    dict.fromkeys(_SIZES.split(), ("a number from 0 to 2147483647", _is_size))
    | dict.fromkeys(_NUMBERS.split(), ("a finite number", _is_number))
    | dict.fromkeys(["model_type", "hidden_act", "activation_function", "rope_type", "type"], ("text", _is_text))
    | dict.fromkeys(_FLAGS.split(), ("true or false", _is_flag))
    | dict.fromkeys(("rope_scaling", "rope_parameters"), ("an object", _is_section))
)


def shape_from_config(config: dict[str, Any], path: object) -> ModelShape:
    """Return the shape that a config.json describes. Raises as `read_shape` does."""
    model_type = config.get("model_type")
    family = READABLE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        model_type = shown(model_type)
        families = ", ".join(FAMILIES)
        raise UnsupportedModelError(
            f"{path}: model_type {model_type} is not supported. Megatron-core trains and shards {families}: use a "
            f"model of these. {_AS_EXPERT}"
        )
    unsupported = family.unsupported(config) | {"cross attention": config.get("add_cross_attention", False)}
    if problem := next((setting for setting, applies in unsupported.items() if applies), None):
        raise UnsupportedModelError(
            f"{path}: {family.name} with {problem} is not supported. Use a model without it. {_AS_EXPERT}"
        )
    try:
        return ModelShape(family=family.name, **family.from_config(config))
    except (ZeroDivisionError, TypeError):
        raise CheckpointError(
            f"{path} has a size that is 0 or null. Every size is at least 1. Copy it again."
        ) from None
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}, which a {family.name} model needs. Copy it again.") from error
    except ValidationError as error:
        problems = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
        reasons = "; ".join(f"{field}: {reason}" if field else reason for field, reason in problems)
        raise CheckpointError(f"{path} is not a valid {family.name} config: {reasons}") from error
