"""Merge methods that measure whole tensors first: the rank of their elements, their length or their angle."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge.registry import Merge, Piece, Whole, method
from btm_scale.checkpoint.merge.statistics import at_least, cosine, count_nonzero, least_of_largest, products
from btm_scale.util.imports import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")  # `merge --help` reads the methods' signatures

_NEARLY_PARALLEL = 0.9995  # beyond this cosine an arc cannot be told from a chord


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


def _variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    mean = _total(deltas) / len(deltas)
    return _total((delta - mean) ** 2 for delta in deltas) / len(deltas)


@method(elementwise=False, exactly=2)
def slerp(whole: Whole) -> Merge:
    """The point on the arc between two tensors that divides their angle by the weights (Shoemake 1985)."""
    cosine_of_both = cosine(products(whole, Piece.copies), 0, 1)

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
def ties(whole: Whole, *, density: float = 0.2, scale: float = 1.0) -> Merge:
    """Trim every difference to its largest `density`, elect signs, average what agrees (arXiv 2306.01708)."""
    count = int(density * whole.elements)
    least = least_of_largest(whole, lambda piece: [delta.abs() for delta in piece.deltas()], count)

    def merged(piece: Piece) -> torch.Tensor:
        deltas = piece.deltas()
        for delta, own_least in zip(deltas, least, strict=True):
            delta.mul_(at_least(delta.abs(), own_least))
        return piece.origin + scale * _elected_mean(deltas, piece.weights)

    return merged


@method(elementwise=False, needs_base=True)
def della(whole: Whole, *, density: float = 0.5, window: float = 0.2, scale: float = 1.0) -> Merge:
    """Keep elements at random, large ones of a row more often, then as `ties` (arXiv 2406.11617).

    The chance rises over a row from `density - window/2` to `density + window/2`, and divides what is kept.
    """

    def merged(piece: Piece) -> torch.Tensor:
        assert piece.noise is not None
        deltas = piece.deltas()
        for i, delta in enumerate(deltas):
            rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(delta.dtype)
            steps = max(delta.shape[-1] - 1, 1) if delta.dim() else 1
            chance = rank.div_(steps).mul_(window).add_(density - window / 2)
            delta.mul_(piece.noise(i) < chance).div_(chance)
        return piece.origin + scale * _elected_mean(deltas, piece.weights)

    return merged


@method(elementwise=False, needs_base=True, weighted=False)
def sce(whole: Whole, *, density: float = 1.0) -> Merge:
    """Select the `density` that varies most, weigh by energy, erase minority signs (arXiv 2408.07990)."""

    def variance(piece: Piece) -> list[torch.Tensor]:
        return [_variance(piece.deltas())]

    least = 0.0
    if density < 1:
        (least,) = least_of_largest(whole, variance, int(density * count_nonzero(whole, variance)))

    def selected(piece: Piece) -> list[torch.Tensor]:
        deltas = piece.deltas()
        mask = at_least(_variance(deltas), least)
        return [delta.mul_(mask) for delta in deltas]

    gram = products(whole, selected)
    energies = [gram[i][i] for i in range(len(gram))]
    total = math.fsum(energies)
    shares = [energy / total if total else 1 / len(energies) for energy in energies]

    def merged(piece: Piece) -> torch.Tensor:
        deltas = selected(piece)
        return piece.origin + _mean_of(deltas, shares, _agreeing(deltas, _total(deltas)))

    return merged


@method(elementwise=False, needs_base=True, weighted=False)
def model_stock(whole: Whole) -> Merge:
    """Between base and mean, nearer to the mean the smaller the models' angle (arXiv 2403.19522)."""
    gram = products(whole, Piece.deltas)
    pairs = list(itertools.combinations(range(len(gram)), 2))
    mean_cosine = math.fsum(cosine(gram, *pair) for pair in pairs) / len(pairs) if pairs else 1.0
    # At obtuse angles the paper's point lies behind the base, and endlessly far where the models cancel out.
    t = max(0, len(gram) * mean_cosine) / (1 + (len(gram) - 1) * max(0, mean_cosine))
    return lambda piece: piece.origin + _total(piece.deltas()) * (t / len(gram))


@method(elementwise=False, needs_base=True, weighted=False)
def widen(whole: Whole, *, threshold: float = 1.0, calibration: float = 1.0) -> Merge:
    """Weigh every column's difference by how far its length and direction moved (arXiv 2408.03092).

    Columns that rank above `threshold` times the model's mean rank weigh `calibration`; others by a softmax
    over the models. Vectors have no direction, and every element is a column of its own.
    """
    if len(whole.shape) > 1:
        lengths, turns = _column_moves(whole)
        rates = (_importance(lengths, threshold, calibration) + _importance(turns, threshold, calibration)) / 2
    else:
        moved = [torch.stack([delta.reshape(-1).abs() for delta in piece.deltas()]) for piece in whole]
        rates = _importance(torch.cat(moved, dim=1), threshold, calibration)

    def merged(piece: Piece) -> torch.Tensor:
        parts = zip(piece.deltas(), rates, strict=True)
        shape = piece.origin.shape
        return piece.origin + _total(d.reshape(-1, len(rate)) * rate for d, rate in parts).reshape(shape)

    return merged


def _column_moves(whole: Whole) -> tuple[torch.Tensor, torch.Tensor]:
    """How much the columns of each model changed their length, and one minus the cosine of their turn."""
    sums: list[torch.Tensor] = []  # of the base and each model: [2, columns], products with itself and the base
    for piece in whole:
        base = piece.origin.reshape(len(piece.origin), -1)
        columns = (tensor.reshape(base.shape) for tensor in itertools.chain([base], piece.tensors))
        own = [torch.stack([(one * one).sum(dim=0), (one * base).sum(dim=0)]) for one in columns]
        sums = [one + other for one, other in zip(sums, own, strict=True)] if sums else own
    first, *others = torch.stack(sums).unbind()
    length = first[0].sqrt()
    lengths = torch.stack([square.sqrt() for square, _ in others])
    inner = torch.stack([product for _, product in others])
    cosines = inner / (lengths.clamp_min(1e-8) * length.clamp_min(1e-8))
    return (lengths - length).abs(), 1 - cosines


def _importance(divergence: torch.Tensor, threshold: float, calibration: float) -> torch.Tensor:
    """Scores `[models, columns]` from how much every model's columns diverge."""
    rank = divergence.argsort(dim=1, stable=True).argsort(dim=1).to(divergence.dtype) / divergence.shape[1]
    scores = torch.softmax(rank, dim=0)
    return scores.masked_fill(rank > rank.mean(dim=1, keepdim=True) * threshold, calibration)
