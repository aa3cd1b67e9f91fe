"""Rotary positions: their frequencies, stretched or not, and the turning of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from btm_scale.model.shape import ModelShape


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Radians by which each pair of a head's numbers turns from one position to the next, float32 [head_size / 2]."""
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    turns = scaling.original * frequencies / (2 * math.pi)  # within the positions of the first training
    share = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return torch.lerp(stretched, frequencies, share)


class Rotary:
    """Turns queries and keys by their positions; the angles are worked out once for every type and device."""

    def __init__(self, frequencies: Tensor) -> None:
        self._frequencies = frequencies
        self._angles: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, heads: Tensor) -> Tensor:
        """Heads [length, batch, heads, d], each turned by its place in the sequence."""
        length, kind = len(heads), (heads.dtype, heads.device)
        if kind not in self._angles or len(self._angles[kind][0]) < length:
            angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)[:, None, None]
            self._angles[kind] = (angles.cos().to(*kind[::-1]), angles.sin().to(*kind[::-1]))
        cos, sin = self._angles[kind]
        return _Turn.apply(heads, cos[:length], sin[:length])


class _Turn(torch.autograd.Function):
    """(left, right) -> (left cos - right sin, right cos + left sin), with as few passes over memory as that takes."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    left, right = heads.chunk(2, dim=-1)
    result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = result.chunk(2, dim=-1)
    torch.mul(left, cos, out=first)
    first.addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=second)
    second.addcmul_(left, sin, value=sign)
    return result
