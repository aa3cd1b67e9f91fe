"""Elementwise merge methods: they stream, and their memory does not grow with the tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge.registry import Piece, method
from btm_scale.util.imports import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")  # `merge --help` reads the methods' signatures


def add_weighted(totals: torch.Tensor, weights: torch.Tensor, tensor: torch.Tensor) -> None:
    """Add the outer product of `weights` [outputs] and `tensor` [elements] to `totals` [outputs, elements].

    All are float64. An element's result does not depend on the number of outputs and elements.
    """
    totals.addcmul_(weights[:, None], tensor)


def _add(total: torch.Tensor, weight: float, tensor: torch.Tensor) -> None:
    add_weighted(total[None], torch.tensor([weight], dtype=torch.float64), tensor)


@method(elementwise=True)
def linear(piece: Piece) -> torch.Tensor:
    """Weighted mean `sum_i w_i x_i / sum_i w_i`, divided last."""
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
    """Task arithmetic on differences kept with probability `density` and rescaled by 1/density (arXiv 2311.03099)."""
    assert piece.noise is not None
    total = piece.zeros.copy_(piece.origin)
    for i, (tensor, weight) in enumerate(zip(piece.tensors, piece.weights, strict=True)):
        kept = (tensor - piece.origin).mul_(piece.noise(i) < density)
        _add(total, scale * weight / density, kept)
    return total


@method(elementwise=True)
def moe(piece: Piece, *, top_k: float = 2) -> torch.Tensor:
    """One mixture of experts: the models' MLPs are its experts, `top_k` per token; the rest is `linear`.

    The piece is a part of the rest; `moe.py` says where the other tensors come from.
    """
    del top_k
    return linear(piece)
