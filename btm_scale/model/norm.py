"""RMS norm and layer norm for Megatron-core's layers, with sequence parallelism.

Megatron-core's wrapper around PyTorch's norms does not support sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


def rms_norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm of values over their last dimension, multiplied by weight [width]."""
    if values.device.type == "cpu":
        normed: Tensor = _RmsNorm.apply(values, weight, epsilon)
        return normed
    return functional.rms_norm(values, weight.shape, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    """PyTorch's RMS norm, with its bits but fewer passes over memory.

    On a CPU, PyTorch differentiates each of the operators that its RMS norm consists of, and keeps two float32 tensors.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        single = _copy(values)
        scale = (single * single).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(values, weight, scale)
        return single.mul_(scale).mul_(weight).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        values, weight, scale = ctx.saved_tensors
        single, gradient = _copy(values), _copy(gradients[0])
        product, for_weight = single * scale, None
        if ctx.needs_input_grad[1]:
            for_weight = product.mul_(gradient).sum(tuple(range(values.ndim - 1))).to(weight.dtype)
        gradient.mul_(weight)
        torch.mul(gradient, single, out=product)
        # Of the scale: d(scale) / d(values) = -scale^3 values / width.
        for_scale = product.sum(-1, keepdim=True).mul_(scale.pow(3).mul_(-0.5)).div_(values.shape[-1]).mul_(2.0)
        gradient.mul_(scale).add_(single.mul_(for_scale))
        return gradient.to(values.dtype), for_weight, None


def _copy(values: Tensor) -> Tensor:
    """Return a copy in the dtype that is computed in, float32 or float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMS norm with the constructor that Megatron-core expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_shared(self, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize hidden [..., hidden]."""
        assert self.eps is not None
        return rms_norm(hidden, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's layer norm with the constructor that Megatron-core expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_shared(self, config)


def mark_shared(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Mark parameters, as Megatron-core does, whose gradient on a tensor rank covers only its part of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
