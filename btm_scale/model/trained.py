"""Parts of a model that can be trained alone, while the rest is frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from btm_scale.model.shape import ModelShape

if TYPE_CHECKING:  # plans are made without torch
    import torch

# Everything; the MLPs of all layers; the routers of a mixture of experts.
TrainedPart = Literal["all", "mlp", "router"]
_WITHIN = {"all": "", "mlp": ".mlp.", "router": ".mlp.router."}  # the Megatron-core names of a part


def is_in(part: TrainedPart, name: str) -> bool:
    """Return whether a Megatron-core tensor belongs to a part."""
    return _WITHIN[part] in name


def frozen_names(shape: ModelShape, part: TrainedPart) -> frozenset[str]:
    """Return the Hugging Face names of the tensors that are frozen while a part is trained."""
    entries = [] if part == "all" else shape.traits.tensors(shape)
    return frozenset(name for entry in entries if not is_in(part, entry.megatron) for name in entry.huggingface)


def freeze_rest(model: torch.nn.Module, part: TrainedPart) -> None:
    """Freeze all parameters outside a part. Call this before an engine wraps the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_in(part, name))
