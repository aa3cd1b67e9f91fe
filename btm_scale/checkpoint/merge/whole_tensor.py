"""Merge methods that compute their weights from statistics of full tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from btm_scale.checkpoint.merge.consensus import agreeing, mean_of, total_of
from btm_scale.checkpoint.merge.registry import Merge, Piece, TensorPieces, method
from btm_scale.checkpoint.merge.statistics import at_least, cosine, count_nonzero, least_of_largest, products
from btm_scale.util.imports import torch


def _variance(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    mean = total_of(deltas) / len(deltas)
    return total_of((delta - mean) ** 2 for delta in deltas) / len(deltas)


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
        weighted = [weight * delta for delta, weight in zip(deltas, weights, strict=True)]
        return piece.origin + mean_of(weighted, weights, agreeing(deltas, total_of(deltas)))

    return merged


@method(elementwise=False, needs_base=True, weighted=False)
def model_stock(pieces: TensorPieces, *, filter_wise: float = 0.0) -> Merge:
    """Interpolate between base and mean, closer to the mean for a smaller angle between models (arXiv 2403.19522).

    `filter_wise` 1 measures the angle of each row of a matrix.
    """
    if filter_wise:

        def by_row(piece: Piece) -> torch.Tensor:
            deltas = piece.deltas()
            return piece.origin + total_of(deltas) * (_row_rates(deltas) / len(deltas))

        return by_row
    gram = products(pieces, Piece.deltas)
    pairs = list(itertools.combinations(range(len(gram)), 2))
    mean_cosine = math.fsum(cosine(gram, *pair) for pair in pairs) / len(pairs) if pairs else 1.0
    # At obtuse angles the paper's point is behind the base, and at infinity where the models cancel out.
    t = max(0, len(gram) * mean_cosine) / (1 + (len(gram) - 1) * max(0, mean_cosine))
    return lambda piece: piece.origin + total_of(piece.deltas()) * (t / len(gram))


def _row_rates(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return how far each row is moved from the base to the mean: [..., 1]."""
    rows = torch.stack([delta.reshape(1, -1) if delta.dim() < 2 else delta for delta in deltas])
    lengths = rows.norm(dim=-1)
    pairs = list(itertools.combinations(range(len(deltas)), 2))
    cosines = [
        # As `cosine` does, 1 if either row is zero.
        ((rows[one] * rows[other]).sum(dim=-1) / (lengths[one] * lengths[other])).masked_fill(
            lengths[one] * lengths[other] == 0, 1
        )
        for one, other in pairs
    ]
    mean = (total_of(cosines) / len(pairs) if pairs else torch.ones_like(lengths[0])).clamp(min=0)
    rates = (len(deltas) * mean / (1 + (len(deltas) - 1) * mean))[..., None]
    return rates.reshape(-1) if deltas[0].dim() < 2 else rates


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
        return piece.origin + total_of(d.reshape(-1, len(rate)) * rate for d, rate in parts).reshape(shape)

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
