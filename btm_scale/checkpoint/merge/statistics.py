"""Statistics of tensors, computed in passes over their pieces: inner products and top-k thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from btm_scale.checkpoint.merge.registry import Piece, TensorPieces
from btm_scale.util.imports import torch

Scores = Callable[[Piece], "Sequence[torch.Tensor]"]


def products(pieces: TensorPieces, vectors: Scores) -> list[list[float]]:
    """Return the Gram matrix of vectors: all their inner products, in float64."""
    total: torch.Tensor | None = None
    for piece in pieces:
        rows = torch.stack([vector.reshape(-1) for vector in vectors(piece)])
        gram = rows @ rows.T
        total = gram if total is None else total.add_(gram)
    result: list[list[float]] = [] if total is None else total.tolist()
    return result


def cosine(gram: Sequence[Sequence[float]], one: int, other: int) -> float:
    """Return the cosine similarity of two of the vectors; 1 if either is zero."""
    length = math.sqrt(gram[one][one] * gram[other][other])
    return gram[one][other] / length if length else 1.0


def count_nonzero(pieces: TensorPieces, scores: Scores) -> int:
    """Return the number of elements of the first score that are nonzero in float32."""
    return sum(int(torch.count_nonzero(scores(piece)[0].float())) for piece in pieces)


def least_of_largest(pieces: TensorPieces, scores: Scores, count: int | Sequence[int]) -> list[float]:
    """Return, for each of the non-negative scores, the smallest of its `count` largest elements, or inf if count is 0.

    `count` is one number for all scores, or one per score. Scores are ranked as float32. The bit patterns of
    non-negative floats are ordered like the floats, so two counting passes, over the upper and then the lower 16 bits,
    find the element without sorting.
    """
    upper = _counted(pieces, lambda piece: [_bits(score) >> 16 for score in scores(piece)])
    wanted = [count] * len(upper) if isinstance(count, int) else list(count)
    if not upper or max(wanted) <= 0:
        return [math.inf] * len(upper)
    places = [_place(counts, max(number, 1)) for counts, number in zip(upper, wanted, strict=True)]

    def lower_bits(piece: Piece) -> list[torch.Tensor]:
        bits = [_bits(score) for score in scores(piece)]
        return [each[each >> 16 == half] & 0xFFFF for each, (half, _) in zip(bits, places, strict=True)]

    lower = _counted(pieces, lower_bits)
    halves = [(half, _place(counts, rest)[0]) for counts, (half, rest) in zip(lower, places, strict=True)]
    values = torch.tensor([high << 16 | low for high, low in halves], dtype=torch.int32)
    least = values.view(torch.float32).tolist()
    return [value if number > 0 else math.inf for value, number in zip(least, wanted, strict=True)]


def at_least(score: torch.Tensor, least: float) -> torch.Tensor:
    """Return a mask of the elements that reach the threshold from `least_of_largest`."""
    return score.float() >= least


def _bits(score: torch.Tensor) -> torch.Tensor:
    return score.reshape(-1).float().abs().view(torch.int32)  # abs: a NaN may have a sign bit


def _counted(pieces: TensorPieces, halves: Scores) -> list[torch.Tensor]:
    """Return a histogram of 16-bit values for each score."""
    totals: list[torch.Tensor] = []
    for piece in pieces:
        counts = [torch.bincount(half, minlength=1 << 16) for half in halves(piece)]
        totals = [one.add_(other) for one, other in zip(totals, counts, strict=True)] if totals else counts
    return totals


def _place(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """Return the value of the `wanted`-th largest entry of a histogram, and how many of that value are wanted."""
    reached = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(reached, wanted))
    above = int(reached[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, wanted - above
