"""Merge methods that need whole tensors: they rank a tensor's elements, or measure its length or angle."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from btm_scale.checkpoint.registry import Piece, method

_NEARLY_PARALLEL = 0.9995  # beyond this cosine an arc cannot be told from a chord
_BLOCK = 1 << 15  # torch sums fewer elements than this in one thread, and so in one order


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """An inner product in float64 whose value depends on no number of threads."""
    blocks = zip(one.reshape(-1).split(_BLOCK), other.reshape(-1).split(_BLOCK), strict=True)
    return math.fsum(float((a.double() * b.double()).sum()) for a, b in blocks)


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    length = math.sqrt(_dot(one, one) * _dot(other, other))
    return _dot(one, other) / length if length else 1.0


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` largest scores; scores equal to the least of them are in as well."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    return scores >= flat.kthvalue(flat.numel() - count + 1).values


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, parts)


def _agreeing(deltas: Sequence[torch.Tensor], total: torch.Tensor) -> list[torch.Tensor]:
    """For every model 1 where its difference has the sign of the total, else 0, in the differences' dtype."""
    elected = torch.where(total >= 0, 1, -1)
    return [(delta.sign() == elected).to(delta.dtype) for delta in deltas]


def _mean_of(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], agreeing: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The weighted mean, element by element, of the differences that agree; 0 where none does."""
    kept = _total(w * d * agrees for w, d, agrees in zip(weights, deltas, agreeing, strict=True))
    share = _total(w * agrees for w, agrees in zip(weights, agreeing, strict=True))
    return kept / share.masked_fill(share == 0, 1)


def _elected_mean(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The weighted mean of those differences that have the sign of the weighted sum, element by element."""
    total = _total(weight * delta for delta, weight in zip(deltas, weights, strict=True))
    return _mean_of(deltas, weights, _agreeing(deltas, total))


@method(elementwise=False, exactly=2)
def slerp(piece: Piece) -> torch.Tensor:
    """The point on the arc between two tensors that divides their angle by the weights (Shoemake 1985)."""
    first, second = (tensor.to(piece.zeros.dtype, copy=True) for tensor in piece.tensors)
    t = piece.weights[1] / sum(piece.weights)
    cosine = _cosine(first, second)
    if abs(cosine) > _NEARLY_PARALLEL:
        return first.mul_(1 - t).add_(second, alpha=t)
    angle = math.acos(cosine)
    return first.mul_(math.sin((1 - t) * angle)).add_(second, alpha=math.sin(t * angle)).div_(math.sin(angle))


@method(elementwise=False, needs_base=True)
def ties(piece: Piece, *, density: float = 0.2, scale: float = 1.0) -> torch.Tensor:
    """Trim every difference to its largest `density`, elect signs, average what agrees (arXiv 2306.01708)."""
    deltas = piece.deltas()
    for delta in deltas:
        delta.mul_(_largest(delta.abs(), int(density * delta.numel())))
    return piece.origin + scale * _elected_mean(deltas, piece.weights)


@method(elementwise=False, needs_base=True)
def della(piece: Piece, *, density: float = 0.5, window: float = 0.2, scale: float = 1.0) -> torch.Tensor:
    """Keep elements by chance, the larger in its row the likelier, then as `ties` (arXiv 2406.11617).

    The chance rises over a row from `density - window/2` to `density + window/2`, and divides what is kept.
    """
    assert piece.noise is not None
    deltas = piece.deltas()
    for i, delta in enumerate(deltas):
        rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(delta.dtype)
        steps = max(delta.shape[-1] - 1, 1) if delta.dim() else 1
        chance = rank.div_(steps).mul_(window).add_(density - window / 2)
        delta.mul_(piece.noise(i) < chance).div_(chance)
    return piece.origin + scale * _elected_mean(deltas, piece.weights)


@method(elementwise=False, needs_base=True, weighted=False)
def sce(piece: Piece, *, density: float = 1.0) -> torch.Tensor:
    """Select the `density` that varies most, weigh by energy, erase minority signs (arXiv 2408.07990)."""
    deltas = piece.deltas()
    mean = _total(deltas) / len(deltas)
    variance = _total((delta - mean) ** 2 for delta in deltas) / len(deltas)
    if density < 1:
        selected = _largest(variance, int(density * int((variance != 0).sum())))
        for delta in deltas:
            delta.mul_(selected)
    energies = [_dot(delta, delta) for delta in deltas]
    total = math.fsum(energies)
    shares = [energy / total if total else 1 / len(deltas) for energy in energies]
    return piece.origin + _mean_of(deltas, shares, _agreeing(deltas, _total(deltas)))


@method(elementwise=False, needs_base=True, weighted=False)
def model_stock(piece: Piece) -> torch.Tensor:
    """Between base and mean, nearer to the mean the smaller the models' angle (arXiv 2403.19522)."""
    deltas = piece.deltas()
    pairs = list(itertools.combinations(deltas, 2))
    cosine = math.fsum(_cosine(one, other) for one, other in pairs) / len(pairs) if pairs else 1.0
    t = len(deltas) * cosine / (1 + (len(deltas) - 1) * cosine)
    return piece.origin + _total(deltas) * (t / len(deltas))


@method(elementwise=False, needs_base=True, weighted=False)
def widen(piece: Piece, *, threshold: float = 1.0, calibration: float = 1.0) -> torch.Tensor:
    """Weigh every column's difference by how far its length and direction moved (arXiv 2408.03092).

    Columns that rank above `threshold` times the model's mean rank weigh `calibration`; others by a softmax
    over the models. Vectors have no direction, and every element is a column of its own.
    """
    base = piece.origin
    matrix = base.reshape(len(base), -1) if base.dim() > 1 else base.reshape(1, -1)
    deltas = [delta.reshape(matrix.shape) for delta in piece.deltas()]
    lengths = torch.stack([((matrix + delta).norm(dim=0) - matrix.norm(dim=0)).abs() for delta in deltas])
    if base.dim() > 1:
        turns = torch.stack([1 - torch.cosine_similarity(matrix + delta, matrix, dim=0) for delta in deltas])
        scores = (
            _importance(lengths, threshold, calibration) + _importance(turns, threshold, calibration)
        ) / 2
    else:
        moved = torch.stack([delta[0].abs() for delta in deltas])
        scores = _importance(moved, threshold, calibration)
    merged = _total(delta * score for delta, score in zip(deltas, scores, strict=True))
    return base + merged.reshape(base.shape)


def _importance(divergence: torch.Tensor, threshold: float, calibration: float) -> torch.Tensor:
    """Scores `[models, columns]` from how much every model's columns diverge."""
    rank = divergence.argsort(dim=1, stable=True).argsort(dim=1).to(divergence.dtype) / divergence.shape[1]
    scores = torch.softmax(rank, dim=0)
    return scores.masked_fill(rank > rank.mean(dim=1, keepdim=True) * threshold, calibration)
