"""Rotary position embeddings: frequencies with optional scaling, and the rotation of queries and keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from btm_scale.model.shape import ModelShape, RopeScaling


def rotary_frequencies(shape: ModelShape) -> Tensor:
    """Return the rotation per position of each pair of a head's dimensions, in radians: float32 [head_size / 2]."""
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    scaled = frequencies / scaling.factor
    if scaling.kind == "linear":
        return scaled
    if scaling.kind == "yarn":
        first, last = (_dimension(rotations, shape, scaling) for rotations in (scaling.high, scaling.low))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, shape.head_size - 1)
        ramp = (torch.arange(shape.head_size // 2, dtype=torch.float32) - first) / (last - first or 1e-3)
        return torch.lerp(frequencies, scaled, ramp.clamp(0, 1))
    rotations = scaling.original * frequencies / (2 * math.pi)  # within the original context length
    weight = ((rotations - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
    return torch.lerp(scaled, frequencies, weight)


def _dimension(rotations: float, shape: ModelShape, scaling: RopeScaling) -> float:
    """Return the pair of dimensions, not rounded, that rotates this often within the original context length."""
    positions = scaling.original / (2 * math.pi * rotations)
    return shape.head_size * math.log(positions) / (2 * math.log(shape.rope_theta))


class Rotary:
    """Rotates queries and keys by their positions, and multiplies them by the `attention` of their scaling.

    The heads it rotates are the part `part` of a sequence that is cut into equal parts. Cosines and sines are cached
    per dtype and device.
    """

    def __init__(self, shape: ModelShape, part: int = 0) -> None:
        self._frequencies = rotary_frequencies(shape)
        self._attention = 1.0 if shape.rope_scaling is None else shape.rope_scaling.attention
        self._part = part
        self._angles: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, heads: Tensor) -> Tensor:
        """Rotate heads [length, batch, heads, d] by their position in the sequence."""
        cos, sin = self.angles(heads)
        return _Rotation.apply(heads, cos[:, None, None], sin[:, None, None])

    def angles(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines [length, d / 2] for heads [length, ...], in their dtype."""
        first, kind = self._part * len(heads), (heads.dtype, heads.device)
        end = first + len(heads)
        if kind not in self._angles or len(self._angles[kind][0]) < end:
            angles = torch.outer(torch.arange(end, dtype=torch.float32), self._frequencies)
            parts = (angles.cos() * self._attention, angles.sin() * self._attention)
            self._angles[kind] = (parts[0].to(*kind[::-1]), parts[1].to(*kind[::-1]))
        cos, sin = self._angles[kind]
        return cos[first:end], sin[first:end]


class _Rotation(torch.autograd.Function):
    """(left, right) -> (left cos - right sin, right cos + left sin), with a minimum of passes over memory."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        result = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        if heads.device.type == "cpu":
            # Attention on a CPU reads a head's rows faster where they follow one another in memory.
            length, batch, number, size = heads.shape
            result = result.view(batch, number, length, size).permute(2, 0, 1, 3)
        return _rotate(heads, cos, sin, 1, result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        gradient = gradients[0]
        result = torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        return _rotate(gradient, cos, sin, -1, result), None, None


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor, sign: int, result: Tensor) -> Tensor:
    """Write the heads, rotated by the angles times `sign`, to `result` and return it."""
    left, right = heads.chunk(2, dim=-1)
    first, second = result.chunk(2, dim=-1)
    torch.mul(left, cos, out=first)
    first.addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=second)
    second.addcmul_(left, sin, value=sign)
    return result
