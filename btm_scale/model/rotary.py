"""The frequencies of rotary positions, stretched or not."""

from __future__ import annotations

import math

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
