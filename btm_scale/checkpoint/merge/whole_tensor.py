"""Merge methods that first compute statistics of full tensors: ranks of elements, norms or angles."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge.registry import Merge, Piece, TensorPieces, method
from btm_scale.checkpoint.merge.statistics import at_least, cosine, count_nonzero, least_of_largest, products
from btm_scale.util.imports import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")  # `merge --help` reads the methods' signatures

_NEARLY_PARALLEL = 0.9995  # above this cosine the arc and the chord are indistinguishable


def _total(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, parts)


def _agreeing(deltas: Sequence[torch.Tensor], total: torch.Tensor) -> list[torch.Tensor]:
    """Return, for every model, 1 where its difference has the sign of the total and 0 elsewhere."""
    elected = torch.where(total >= 0, 1, -1)
    return [(delta.sign() == elected).to(delta.dtype) for delta in deltas]


def _mean_of(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], agreeing: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the elementwise weighted mean of the agreeing differences, or 0 where none agrees."""
    kept = _total(w * d * agrees for w, d, agrees in zip(weights, deltas, agreeing, strict=True))
    weight = _total(w * agrees for w, agrees in zip(weights, agreeing, strict=True))
    return kept / weight.masked_fill(weight == 0, 1)


def _elected_mean(deltas: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the elementwise weighted mean of the differences that have the sign of their weighted sum."""
    total = _total(weight * delta for delta, weight in zip(deltas, weights, strict=True))
    return _mean_of(deltas, weights, _agreeing(deltas, total))


def _variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    mean = _total(deltas) / len(deltas)
    return _total((delta - mean) ** 2 for delta in deltas) / len(deltas)


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


@method(elementwise=False, needs_base=True)
def ties(pieces: TensorPieces, *, density: float = 0.2, scale: float = 1.0) -> Merge:
    """Keep the largest `density` of every difference, elect signs, average what agrees (arXiv 2306.01708)."""
    count = int(density * pieces.elements)
    least = least_of_largest(pieces, lambda piece: [delta.abs() for delta in piece.deltas()], count)

    def merged(piece: Piece) -> torch.Tensor:
        deltas = piece.deltas()
        for delta, threshold in zip(deltas, least, strict=True):
            delta.mul_(at_least(delta.abs(), threshold))
        return piece.origin + scale * _elected_mean(deltas, piece.weights)

    return merged


@method(elementwise=False, needs_base=True)
def della(pieces: TensorPieces, *, density: float = 0.5, window: float = 0.2, scale: float = 1.0) -> Merge:
    """Keep elements at random, large ones of a row more often, then elect signs as `ties` does (arXiv 2406.11617).

    The probability to keep an element rises with its rank in the row from `density - window/2` to
    `density + window/2`; kept elements are divided by it.
    """

    def merged(piece: Piece) -> torch.Tensor:
        assert piece.noise is not None
        deltas = piece.deltas()
        for i, delta in enumerate(deltas):
            rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(delta.dtype)
            steps = max(delta.shape[-1] - 1, 1) if delta.dim() else 1
            probability = rank.div_(steps).mul_(window).add_(density - window / 2)
            delta.mul_(piece.noise(i) < probability).div_(probability)
        return piece.origin + scale * _elected_mean(deltas, piece.weights)

    return merged


@method(elementwise=False, needs_base=True, weighted=False)
def sce(pieces: TensorPieces, *, density: float = 1.0) -> Merge:
    """Select the `density` of highest variance, weight by energy, erase minority signs (arXiv 2408.07990)."""

    def variance(piece: Piece) -> list[torch.Tensor]:
        return [_variance(piece.deltas())]

    least = 0.0
    if density < 1:
        (least,) = least_of_largest(pieces, variance, int(density * count_nonzero(pieces, variance)))

    def selected(piece: Piece) -> list[torch.Tensor]:
        deltas = piece.deltas()
        mask = at_least(_variance(deltas), least)
        return [delta.mul_(mask) for delta in deltas]

    gram = products(pieces, selected)
    energies = [gram[i][i] for i in range(len(gram))]
    total = math.fsum(energies)
    weights = [energy / total if total else 1 / len(energies) for energy in energies]

    def merged(piece: Piece) -> torch.Tensor:
        deltas = selected(piece)
        return piece.origin + _mean_of(deltas, weights, _agreeing(deltas, _total(deltas)))

    return merged


@method(elementwise=False, needs_base=True, weighted=False)
def model_stock(pieces: TensorPieces) -> Merge:
    """Interpolate between base and mean, closer to the mean for a smaller angle between models (arXiv 2403.19522)."""
    gram = products(pieces, Piece.deltas)
    pairs = list(itertools.combinations(range(len(gram)), 2))
    mean_cosine = math.fsum(cosine(gram, *pair) for pair in pairs) / len(pairs) if pairs else 1.0
    # At obtuse angles the paper's point is behind the base, and at infinity where the models cancel out.
    t = max(0, len(gram) * mean_cosine) / (1 + (len(gram) - 1) * max(0, mean_cosine))
    return lambda piece: piece.origin + _total(piece.deltas()) * (t / len(gram))


@method(elementwise=False, needs_base=True, weighted=False)
def widen(pieces: TensorPieces, *, threshold: float = 1.0, calibration: float = 1.0) -> Merge:
    """Weight every column's difference by how far its norm and direction moved (arXiv 2408.03092).

    Columns that rank above `threshold` times the model's mean rank get the weight `calibration`, others a softmax
    over the models. In vectors every element is a column without direction.
    """
    if len(pieces.shape) > 1:
        norms, directions = _column_moves(pieces)
        rates = (_importance(norms, threshold, calibration) + _importance(directions, threshold, calibration)) / 2
    else:
        moved = [torch.stack([delta.reshape(-1).abs() for delta in piece.deltas()]) for piece in pieces]
        rates = _importance(torch.cat(moved, dim=1), threshold, calibration)

    def merged(piece: Piece) -> torch.Tensor:
        parts = zip(piece.deltas(), rates, strict=True)
        shape = piece.origin.shape
        return piece.origin + _total(d.reshape(-1, len(rate)) * rate for d, rate in parts).reshape(shape)

    return merged


def _column_moves(pieces: TensorPieces) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much each model's column norms changed, and 1 - cosine to the base's columns: [models, columns]."""
    sums: list[torch.Tensor] = []  # per model, base first: [2, columns], products with itself and the base
    for piece in pieces:
        base = piece.origin.reshape(len(piece.origin), -1)
        columns = (tensor.reshape(base.shape) for tensor in itertools.chain([base], piece.tensors))
        part = [torch.stack([(one * one).sum(dim=0), (one * base).sum(dim=0)]) for one in columns]
        sums = [one + other for one, other in zip(sums, part, strict=True)] if sums else part
    first, *others = torch.stack(sums).unbind()
    base_norm = first[0].sqrt()
    norms = torch.stack([square.sqrt() for square, _ in others])
    inner = torch.stack([product for _, product in others])
    cosines = inner / (norms.clamp_min(1e-8) * base_norm.clamp_min(1e-8))
    return (norms - base_norm).abs(), 1 - cosines


def _importance(divergence: torch.Tensor, threshold: float, calibration: float) -> torch.Tensor:
    """Return scores `[models, columns]` from the divergence of every model's columns."""
    rank = divergence.argsort(dim=1, stable=True).argsort(dim=1).to(divergence.dtype) / divergence.shape[1]
    scores = torch.softmax(rank, dim=0)
    return scores.masked_fill(rank > rank.mean(dim=1, keepdim=True) * threshold, calibration)
