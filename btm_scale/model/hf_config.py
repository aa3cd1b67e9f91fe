"""The config.json of a model: what Hugging Face, vLLM and others need to build it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from btm_scale.errors import CheckpointError
from btm_scale.model.families import FAMILIES
from btm_scale.model.shape import ModelShape


def config_json(shape: ModelShape, *, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """The config of a shape; `dtype` is `bfloat16` or `float32`."""
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
    """The shape of the model in a Hugging Face directory. Raises CheckpointError if it says none that can be built."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory} is not a Hugging Face model: {path} cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a JSON {type(config).__name__}, and must be an object. Copy it again.")
    return shape_from_config(config, path)


def shape_from_config(config: dict[str, Any], path: object) -> ModelShape:
    """The shape that a config.json describes. Raises CheckpointError for what this project can't build."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        known = ", ".join(FAMILIES)
        raise CheckpointError(
            f"{path}: model_type '{config.get('model_type')}' is not supported; it must be one of {known}"
        )
    problems = family.unsupported(config) | {"cross attention": config.get("add_cross_attention", False)}
    if found := next((setting for setting, applies in problems.items() if applies), None):
        raise CheckpointError(f"{path}: a {family.name} model with {found} is not supported; use a model without")
    try:
        return ModelShape(family=family.name, **family.from_config(config))
    except KeyError as error:
        raise CheckpointError(
            f"{path} does not say {error}, which a {family.name} model needs; copy it again"
        ) from error
    except ValidationError as error:
        told = "; ".join(problem["msg"] for problem in error.errors())
        raise CheckpointError(f"{path} describes no {family.name} model: {told}") from error
