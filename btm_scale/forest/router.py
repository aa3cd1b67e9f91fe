"""Routers in closed form: one row per expert and layer, computed from the experts' sums without any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from btm_scale.forest.router_sums import LayerSums, RouterSums
from btm_scale.model.hf_names import table
from btm_scale.model.shape import ModelShape
from btm_scale.util.one_thread import one_torch_thread

_RIDGE = 1e-3  # of the covariance's mean diagonal, so that few tokens suffice


def fitted(layers: Sequence[LayerSums]) -> Tensor:
    """Return the rows [experts, hidden] of linear discriminant analysis on a layer's inputs.

    Expert j's logit is log p(x | domain j), up to what all have in common, for Gaussians with one covariance S: with
    the means m_j and their mean m, (x - (m_j + m) / 2) S^-1 (m_j - m). A gate has no bias, so the constant is added
    through the direction whose product with m is 1 and which varies the least otherwise.
    """
    means = torch.stack([layer.mean for layer in layers])
    mean = means.mean(dim=0)
    within = sum((layer.second - layer.mean.outer(layer.mean) for layer in layers), torch.zeros(())) / len(layers)
    within = within + _RIDGE * within.diagonal().mean() * torch.eye(len(mean), dtype=within.dtype)
    rows = torch.linalg.solve(within, (means - mean).t()).t()
    constants = -0.5 * ((means + mean) * rows).sum(dim=1)
    direction = torch.linalg.solve(within + mean.outer(mean), mean)
    return rows + constants[:, None] * (direction / (direction @ mean))


def hidden(layers: Sequence[LayerSums]) -> Tensor:
    """Return the rows of mergekit-moe's `hidden` gates: each domain's mean input, less that of all, of norm 1."""
    means = torch.stack([layer.mean for layer in layers])
    return torch.nn.functional.normalize(means - means.mean(dim=0), dim=1)


_BY_LAYER: Mapping[str, Callable[[Sequence[LayerSums]], Tensor]] = {"fitted": fitted, "hidden": hidden}


def gates(kind: str, shape: ModelShape, experts: Sequence[RouterSums]) -> dict[str, Tensor]:
    """Return the gate of every layer of a mixture under its Hugging Face name: float32 [experts, hidden].

    `kind` is one of ROUTERS but `random`, which needs no sums, and `fitted-routed`, which needs the mixture.
    """
    with one_torch_thread():
        return {name: _gate(kind, i, experts).float().contiguous() for i, name in enumerate(gate_names(shape))}


def _gate(kind: str, layer: int, experts: Sequence[RouterSums]) -> Tensor:
    if kind == "embedding":
        return torch.stack([expert.embedding for expert in experts])
    return _BY_LAYER[kind]([expert.layer(layer) for expert in experts])


def gate_names(shape: ModelShape) -> list[str]:
    """Return the Hugging Face names of the gates, by layer."""
    return [entry.huggingface[0] for entry in table(shape) if entry.megatron.endswith(".router.weight")]
