"""Which formats a checkpoint can be converted to: one decision for `convert`, `inspect` and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from btm_scale.checkpoint.completeness import has_own_head, require_complete
from btm_scale.checkpoint.formats.megatron import find_shape, require_names
from btm_scale.checkpoint.formats.open import open_model, with_head_names
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.universal_writer import require_moments
from btm_scale.checkpoint.merge.compatibility import is_derived
from btm_scale.errors import CheckpointError, few_names
from btm_scale.model.hf_names import from_huggingface, table, to_huggingface
from btm_scale.model.shape import ModelShape

HUGGINGFACE, MEGATRON, DEEPSPEED, UNIVERSAL = "huggingface", "megatron", "deepspeed", "universal"
TARGETS = (HUGGINGFACE, MEGATRON, DEEPSPEED, UNIVERSAL)


def require_convertible(model: ModelReader, path: Path, to: str) -> None:
    """Raise `CheckpointError` unless the model in `path`, opened as `model`, can be converted to the format `to`.

    Tensor parallel degrees are left to the caller.
    """
    if to == HUGGINGFACE:
        require_complete(model)
        return
    _require_dense(model, path)
    if to == UNIVERSAL:
        require_moments(path)


def targets_of(model: ModelReader, path: Path) -> tuple[tuple[str, ...], str | None]:
    """Return the formats to which a model can be converted, and how its weights differ from its config.

    The difference is None if they fit, or if config.json describes a mixture of experts or no supported family.
    """
    problem, misfit = _refusal(require_complete, model), _refusal(_require_dense, model, path)
    targets = [] if problem else [HUGGINGFACE]
    if misfit is None:
        targets += [MEGATRON, DEEPSPEED]
        targets += [] if _refusal(require_moments, path) else [UNIVERSAL]
    return tuple(targets), problem or (misfit if _has_dense_config(path) else None)


def _refusal(require: Callable[..., None], *arguments: object) -> str | None:
    """Return the message of the error that a check raises, or None."""
    try:
        require(*arguments)
    except CheckpointError as error:
        return str(error)
    return None


def _require_dense(model: ModelReader, path: Path) -> None:
    """Raise `CheckpointError` unless Megatron-core has a dense model with exactly these tensors."""
    shape = find_shape(path)
    if shape.experts:
        raise CheckpointError(
            f"{path} is a mixture of experts. Mixtures are converted to huggingface only: use --to huggingface."
        )
    require_complete(model)
    require_untied(model, shape)
    require_described(with_head_names(model), shape)


def require_trainable(path: Path) -> None:
    """Raise `CheckpointError` unless a Hugging Face model is complete and of a family that can be trained."""
    with open_model(path) as model:
        if find_shape(path).experts:
            raise CheckpointError(f"{path} is a mixture of experts, which is not trained here. Choose another model.")
        require_convertible(model, path, MEGATRON)


def require_untied(model: ModelReader, shape: ModelShape) -> None:
    """Raise `CheckpointError` for a model with an LM head beside the embedding to which its config.json ties it."""
    if shape.tied and has_own_head(model):
        raise CheckpointError(
            f"{model.path} ties its embeddings in config.json, but its LM head has other values than the embedding. "
            "transformers loads both. Set tie_word_embeddings to false in config.json to keep them, or remove the LM "
            "head."
        )


def require_described(model: ModelReader, shape: ModelShape) -> None:
    """Raise `CheckpointError` unless a model has exactly the tensors and shapes that its config.json describes."""
    specs = {name: spec for name, spec in model.specs().items() if not is_derived(name, model)}
    if heads := [name for name in specs if name.startswith("v_head.")]:
        raise CheckpointError(
            f"{model.path} has a value head for training with TRL: {few_names(heads, 'tensors')}. Megatron-core's "
            "models have none. Save the model without it: model.pretrained_model.save_pretrained(DIR)."
        )
    entries = table(shape)
    require_names(model.path, specs.keys(), {name for entry in entries for name in entry.huggingface})

    def blank(name: str) -> torch.Tensor:
        return torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta")

    for entry in entries:
        try:
            converted = from_huggingface(entry, blank, shape, shape.vocabulary)
            back = to_huggingface(entry, converted, shape)
        except (RuntimeError, ValueError):
            back = {}
        if any(name not in back or back[name].shape != specs[name].shape for name in entry.huggingface):
            tensors = ", ".join(f"'{name}' {list(specs[name].shape)}" for name in entry.huggingface)
            raise CheckpointError(
                f"{model.path}: {tensors} does not fit config.json. Use the config.json that belongs to these weights."
            )


def _has_dense_config(path: Path) -> bool:
    """Whether config.json describes a model of a supported family that is not a mixture."""
    try:
        return not find_shape(path).experts
    except CheckpointError:
        return False
