"""Merge methods that treat every element alone: they stream, with memory that does not grow with a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge.registry import Piece, method
from btm_scale.util.imports import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")  # `merge --help` reads the methods' signatures


def add_weighted(totals: torch.Tensor, weights: torch.Tensor, tensor: torch.Tensor) -> None:
    """Add `weights` [outputs] times `tensor` [elements] to `totals` [outputs, elements], all of float64.

    Each element goes through the same operation however many outputs and elements there are.
    """
    totals.addcmul_(weights[:, None], tensor)


def _add(total: torch.Tensor, weight: float, tensor: torch.Tensor) -> None:
    add_weighted(total[None], torch.tensor([weight], dtype=torch.float64), tensor)


@method(elementwise=True)
def linear(piece: Piece) -> torch.Tensor:
    """The weighted mean `sum_i w_i x_i / sum_i w_i`, divided last."""
    total = piece.zeros
    for tensor, weight in zip(piece.tensors, piece.weights, strict=True):
        _add(total, weight, tensor)
    return total.div_(sum(piece.weights))


@method(elementwise=True, needs_base=True)
def task_arithmetic(piece: Piece, *, scale: float = 1.0) -> torch.Tensor:
    """`b + scale * sum_i w_i (x_i - b)` (arXiv 2212.04089)."""
    total = piece.zeros
    for tensor, weight in zip(piece.tensors, piece.weights, strict=True):
        _add(total, scale * weight, tensor)
    _add(total, 1 - scale * sum(piece.weights), piece.origin)
    return total


@method(elementwise=True, needs_base=True)
def dare(piece: Piece, *, density: float = 0.5, scale: float = 1.0) -> torch.Tensor:
    """Task arithmetic on a random `density` of the differences, divided by it (arXiv 2311.03099)."""
    assert piece.noise is not None
    total = piece.zeros.copy_(piece.origin)
    for i, (tensor, weight) in enumerate(zip(piece.tensors, piece.weights, strict=True)):
        kept = (tensor - piece.origin).mul_(piece.noise(i) < density)
        _add(total, scale * weight / density, kept)
    return total
