"""Merge methods that keep part of every difference from the base: by magnitude, or at random by rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge.consensus import elected, weighted_sum
from btm_scale.checkpoint.merge.registry import Merge, PerModel, Piece, TensorPieces, for_each, method
from btm_scale.checkpoint.merge.statistics import at_least, least_of_largest

if TYPE_CHECKING:
    import torch

Combine = Callable[[Sequence["torch.Tensor"], Sequence[float], float], "torch.Tensor"]
_SMALLEST_NORM = 1e-7  # of which a factor is computed


@method(elementwise=False, needs_base=True)
def ties(
    pieces: TensorPieces,
    *,
    density: PerModel = 0.2,
    scale: float = 1.0,
    normalize: float = 1.0,
    rescale: float = 0.0,
) -> Merge:
    """Keep the largest `density` of every difference, elect signs, average what agrees (arXiv 2306.01708).

    `normalize` 0 adds what agrees instead; `rescale` 1 restores each difference's sum of magnitudes.
    """

    def bounds(models: int) -> list[tuple[float, float]]:
        counts = [int(fraction * pieces.elements) for fraction in for_each(density, models)]
        return [(least, math.inf) for least in least_of_largest(pieces, _magnitudes, counts)]

    return _of_magnitudes(pieces, bounds, elected, scale, normalize, rescale)


@method(elementwise=False, needs_base=True)
def breadcrumbs(
    pieces: TensorPieces,
    *,
    density: PerModel = 0.9,
    gamma: PerModel = 0.01,
    scale: float = 1.0,
    normalize: float = 0.0,
    rescale: float = 0.0,
) -> Merge:
    """Task arithmetic on differences without their largest `gamma` and their smallest elements (arXiv 2312.06795).

    A fraction `density` of the elements is kept. `normalize` 1 divides by the weights' sum; `rescale` 1 restores each
    difference's sum of magnitudes.
    """
    bounds = _without_outliers(pieces, density, gamma)
    return _of_magnitudes(pieces, bounds, weighted_sum, scale, normalize, rescale)


@method(elementwise=False, needs_base=True)
def breadcrumbs_ties(
    pieces: TensorPieces,
    *,
    density: PerModel = 0.9,
    gamma: PerModel = 0.01,
    scale: float = 1.0,
    normalize: float = 0.0,
    rescale: float = 0.0,
) -> Merge:
    """Drop elements as `breadcrumbs` does, then elect signs as `ties` does (arXiv 2312.06795, 2306.01708).

    `normalize` 1 divides by the weights of the models that agree.
    """
    bounds = _without_outliers(pieces, density, gamma)
    return _of_magnitudes(pieces, bounds, elected, scale, normalize, rescale)


@method(elementwise=False, needs_base=True)
def della(
    pieces: TensorPieces,
    *,
    density: PerModel = 0.5,
    window: PerModel = 0.2,
    scale: float = 1.0,
    normalize: float = 1.0,
    rescale: float = 1.0,
) -> Merge:
    """Keep elements at random, large ones of a row more often, then elect signs as `ties` does (arXiv 2406.11617).

    The probability to keep an element rises with its rank in the row from `density - window/2` to
    `density + window/2`; kept elements are divided by it, unless `rescale` is 0.
    """
    return lambda piece: (
        piece.origin + scale * elected(_kept_by_rank(piece, density, window, rescale), piece.weights, normalize)
    )


@method(elementwise=False, needs_base=True)
def della_linear(
    pieces: TensorPieces,
    *,
    density: PerModel = 0.5,
    window: PerModel = 0.2,
    scale: float = 1.0,
    normalize: float = 0.0,
    rescale: float = 1.0,
) -> Merge:
    """Keep elements at random as `della` does, and add them without an election of signs (arXiv 2406.11617)."""
    return lambda piece: (
        piece.origin + scale * weighted_sum(_kept_by_rank(piece, density, window, rescale), piece.weights, normalize)
    )


def _kept_by_rank(piece: Piece, density: PerModel, window: PerModel, rescale: float) -> list[torch.Tensor]:
    deltas = piece.deltas()
    densities, windows = for_each(density, len(deltas)), for_each(window, len(deltas))
    for i, delta in enumerate(deltas):
        rank = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(delta.dtype)
        steps = max(delta.shape[-1] - 1, 1) if delta.dim() else 1
        probability = rank.div_(steps).mul_(windows[i]).add_(densities[i] - windows[i] / 2)
        delta.mul_(piece.random(i) < probability)
        if rescale:
            delta.div_(probability)
    return deltas


def _magnitudes(piece: Piece) -> list[torch.Tensor]:
    return [delta.abs() for delta in piece.deltas()]


def _without_outliers(
    pieces: TensorPieces, density: PerModel, gamma: PerModel
) -> Callable[[int], list[tuple[float, float]]]:
    """Return a function that measures the smallest and the largest magnitude that each model keeps."""
    elements = pieces.elements

    def bounds(models: int) -> list[tuple[float, float]]:
        kept = [int(fraction * elements) for fraction in for_each(density, models)]
        # Fewer outliers are removed where the density could not be reached without them.
        dropped = [
            min(int(fraction * elements), elements - number)
            for fraction, number in zip(for_each(gamma, models), kept, strict=True)
        ]
        counts = [one + other for one, other in zip(kept, dropped, strict=True)]
        counts += [number + 1 for number in dropped]
        least = least_of_largest(pieces, lambda piece: [*_magnitudes(piece)] * 2, counts)
        return [
            (low, high) if number else (math.inf, math.inf)
            for low, high, number in zip(least[:models], least[models:], kept, strict=True)
        ]

    return bounds


def _of_magnitudes(
    pieces: TensorPieces,
    bounds_of: Callable[[int], list[tuple[float, float]]],
    combine: Combine,
    scale: float,
    normalize: float,
    rescale: float,
) -> Merge:
    """Return the merge of the differences' elements whose magnitudes are within each model's bounds."""
    bounds = bounds_of(_number_of_models(pieces))

    def drop(deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        for delta, (least, largest) in zip(deltas, bounds, strict=True):
            magnitude = delta.abs()
            mask = at_least(magnitude, least)
            if largest != math.inf:
                mask &= magnitude.float() <= largest
            delta.mul_(mask)
        return deltas

    factors = _norm_factors(pieces, drop) if rescale else [1.0] * len(bounds)

    def merged(piece: Piece) -> torch.Tensor:
        deltas = drop(piece.deltas())
        if rescale:
            deltas = [delta.mul_(factor) for delta, factor in zip(deltas, factors, strict=True)]
        return piece.origin + scale * combine(deltas, piece.weights, normalize)

    return merged


def _number_of_models(pieces: TensorPieces) -> int:
    return len(next(iter(pieces)).weights)


def _norm_factors(pieces: TensorPieces, drop: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> list[float]:
    """Return, for each model, its difference's sum of magnitudes divided by that of the kept elements."""
    before: list[list[float]] = []
    after: list[list[float]] = []
    for piece in pieces:
        deltas = piece.deltas()
        before.append([float(delta.abs().sum()) for delta in deltas])
        after.append([float(delta.abs().sum()) for delta in drop(deltas)])
    norms = [[math.fsum(column) for column in zip(*sums, strict=True)] for sums in (before, after)]
    return [full / kept if min(full, kept) >= _SMALLEST_NORM else 1.0 for full, kept in zip(*norms, strict=True)]
