"""Read and write config.json, from which Hugging Face, vLLM and others build a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from btm_scale.errors import CheckpointError
from btm_scale.model.families import FAMILIES
from btm_scale.model.shape import ModelShape
from btm_scale.util.inside import file_inside


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
    """Return the shape of the model in a Hugging Face directory. Raises `CheckpointError` if it is not supported."""
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not directory.exists():
            raise CheckpointError(
                f"{directory} does not exist. Train the model, or give the path of an existing Hugging Face directory."
            ) from None
        raise CheckpointError(
            f"{directory} is not a model: it has no config.json. Train it, or choose another model."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{directory} is not a Hugging Face model: {path} cannot be read ({error}). Copy it again."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a JSON {type(config).__name__}, but must be an object. Copy it again.")
    return config


def shape_from_config(config: dict[str, Any], path: object) -> ModelShape:
    """Return the shape that a config.json describes. Raises `CheckpointError` if it is not supported."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        families = ", ".join(FAMILIES)
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported. Use a model of {families}.")
    problems = family.unsupported(config) | {"cross attention": config.get("add_cross_attention", False)}
    if problem := next((setting for setting, applies in problems.items() if applies), None):
        raise CheckpointError(f"{path}: {family.name} with {problem} is not supported. Use a model without it.")
    try:
        return ModelShape(family=family.name, **family.from_config(config))
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}, which a {family.name} model needs. Copy it again.") from error
    except ValidationError as error:
        reasons = "; ".join(problem["msg"] for problem in error.errors())
        raise CheckpointError(f"{path} is not a valid {family.name} config: {reasons}") from error
