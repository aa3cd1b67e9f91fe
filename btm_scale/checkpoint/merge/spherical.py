"""Merge methods on the sphere: models are directions and lengths, and a merge is a direction between them.

A direction between models is a linear combination of them, so that these methods compute its coefficients from the
inner products of the tensors, in one pass, and then add the tensors in a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from btm_scale.checkpoint.merge.consensus import total_of
from btm_scale.checkpoint.merge.registry import Merge, Piece, TensorPieces, method
from btm_scale.checkpoint.merge.statistics import cosine, products
from btm_scale.util.imports import torch

_NEARLY_PARALLEL = 0.9995  # above this cosine the arc and the chord are indistinguishable
_PARALLEL = 1e-16  # below this squared sine nuslerp's arc is a chord
_SMALLEST_SUM = 1e-6


@method(elementwise=False, exactly=2)
def slerp(pieces: TensorPieces) -> Merge:
    """Spherical interpolation of two tensors; the weights divide their angle (Shoemake 1985)."""
    cosine_of_both = cosine(products(pieces, Piece.copies), 0, 1)

    def merged(piece: Piece) -> torch.Tensor:
        t = piece.weights[1] / sum(piece.weights)
        first, second = piece.copies()
        if abs(cosine_of_both) > _NEARLY_PARALLEL:
            return first.mul_(1 - t).add_(second, alpha=t)
        angle = math.acos(cosine_of_both)
        arc = first.mul_(math.sin((1 - t) * angle)).add_(second, alpha=math.sin(t * angle))
        return arc.div_(math.sin(angle))

    return merged


@method(elementwise=False, exactly=2, may_have_base=True)
def nuslerp(pieces: TensorPieces, *, flatten: float = 1.0, row_wise: float = 0.0) -> Merge:
    """Spherical interpolation of two models, or of their differences from a base (Shoemake 1985; by mergekit).

    `flatten` 0 interpolates each row of a matrix on its own, with `row_wise` 1 each column.
    """
    if flatten or (row_wise and len(pieces.shape) < 2):
        gram = torch.tensor(products(pieces, Piece.vectors), dtype=torch.float64)
        sums = gram[0, 0], gram[1, 1], gram[0, 1]
    elif row_wise:
        sums = _column_products(pieces)

    def merged(piece: Piece) -> torch.Tensor:
        first, second = piece.vectors()
        own = sums if flatten or row_wise else _row_products(first, second)
        total = sum(piece.weights)
        t = 0.5 if abs(total) < _SMALLEST_SUM else piece.weights[1] / total
        one, other = _on_arc(own, t)
        result = first * one + second * other
        return result if piece.base is None else result + piece.base

    return merged


Products = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""The products of two vectors: the first with itself, the second with itself, one with the other."""


def _row_products(first: torch.Tensor, second: torch.Tensor) -> Products:
    own, its, both = ((one * other).sum(dim=-1, keepdim=True) for one, other in _pairs(first, second))
    return own, its, both


def _column_products(pieces: TensorPieces) -> Products:
    sums: torch.Tensor | None = None
    for piece in pieces:
        part = torch.stack([(one * other).sum(dim=0) for one, other in _pairs(*piece.vectors())])
        sums = part if sums is None else sums.add_(part)
    assert sums is not None
    return sums[0], sums[1], sums[2]


def _pairs(first: torch.Tensor, second: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    return (first, first), (second, second), (first, second)


def _on_arc(sums: Products, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the coefficients of two vectors at `t` of the angle between them; of the chord for parallel ones."""
    first, second, both = sums
    lengths = first.sqrt().clamp(min=1e-7) * second.sqrt().clamp(min=1e-7)
    between = (both / lengths).clamp(-1, 1)
    is_parallel = 1 - between.square() <= _PARALLEL
    angle = between.masked_fill(is_parallel, 0).acos()
    one, other = ((1 - t) * angle).sin() / angle.sin(), (t * angle).sin() / angle.sin()
    return one.masked_fill(is_parallel, 1 - t), other.masked_fill(is_parallel, t)


@method(elementwise=False, may_have_base=True)
def multislerp(pieces: TensorPieces, *, normalize: float = 1.0, eps: float = 1e-8) -> Merge:
    """Weighted mean of the models' directions, with the weighted mean of their lengths (by mergekit).

    With a base, of their differences from it. `normalize` 0 uses the weights as they are. Directions that cancel out
    are averaged linearly.
    """
    gram = products(pieces, Piece.vectors)

    def merged(piece: Piece) -> torch.Tensor:
        total = sum(piece.weights)
        weights = [weight / total for weight in piece.weights] if normalize else list(piece.weights)
        result = _combined(piece.vectors(), _mean_direction(gram, weights, eps))
        return result if piece.base is None else result + piece.base

    return merged


def _mean_direction(gram: Sequence[Sequence[float]], weights: Sequence[float], eps: float) -> list[float]:
    """Return the coefficients of the vectors in their mean direction, times their mean length."""
    if len(gram) == 1:
        return [1.0]
    lengths = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    units = [weight / (length + eps) for weight, length in zip(weights, lengths, strict=True)]
    square = math.fsum(a * b * gram[i][j] for i, a in enumerate(units) for j, b in enumerate(units))
    length = math.sqrt(square) if square >= 0 else 0.0 if square < 0 else math.nan
    if length < eps:
        return list(weights)
    mean_length = math.fsum(weight * each for weight, each in zip(weights, lengths, strict=True))
    return [unit / length * mean_length for unit in units]


@method(elementwise=False, weighted=False)
def karcher(pieces: TensorPieces, *, max_iter: float = 10.0, tol: float = 1e-5) -> Merge:
    """Karcher mean: the direction that minimizes the squared angles to all models (arXiv 2603.04972).

    It has the models' mean length. The iteration ends after `max_iter` steps, or at a step below `tol`.
    """
    gram = products(pieces, Piece.copies)
    coefficients = _karcher_mean(torch.tensor(gram, dtype=torch.float64), int(max_iter), tol)
    return lambda piece: _combined(piece.copies(), coefficients)


def _karcher_mean(gram: torch.Tensor, max_iter: int, tol: float) -> list[float]:
    """Return the coefficients of the vectors in their Karcher mean, from their inner products."""
    if len(gram) == 1:
        return [1.0]
    lengths = gram.diagonal().sqrt()
    is_valid = ~(lengths <= tol)  # a NaN is not ignored
    if not is_valid.any():
        return [0.0] * len(gram)
    count = int(is_valid.sum())
    inverse = torch.where(is_valid, 1 / lengths, 0)
    units = gram * inverse[:, None] * inverse

    def length_of(direction: torch.Tensor) -> float:
        return float((direction @ units @ direction).clamp(min=0).sqrt())

    mean = is_valid.double() / count
    if (length := length_of(mean)) < tol:
        mean = torch.zeros_like(mean).index_fill_(0, is_valid.nonzero()[0], 1.0)
    else:
        mean = mean / length
    for _ in range(max_iter):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.acos()
        moves = is_valid & ~(angles < tol)
        rates = torch.where(moves, angles / angles.sin() / count, 0)
        tangent = rates - (rates * cosines).sum() * mean
        length = length_of(tangent)
        if not length >= tol:  # or not a number
            break
        mean = math.cos(length) * mean + math.sin(length) / length * tangent
        mean = mean / length_of(mean)
    result: list[float] = (mean * inverse * lengths.mean()).tolist()
    return result


def _combined(vectors: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    return total_of(vector * factor for vector, factor in zip(vectors, coefficients, strict=True))
