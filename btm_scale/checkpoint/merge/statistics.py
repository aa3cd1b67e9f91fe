"""What merge methods measure of whole tensors, in passes over their pieces: products, and the largest elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from btm_scale.checkpoint.merge.registry import Piece, Whole
from btm_scale.util.imports import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")  # `merge --help` imports this file

Scores = Callable[[Piece], "Sequence[torch.Tensor]"]


def products(whole: Whole, vectors: Scores) -> list[list[float]]:
    """All inner products of some vectors with each other, in float64."""
    total: torch.Tensor | None = None
    for piece in whole:
        rows = torch.stack([vector.reshape(-1) for vector in vectors(piece)])
        gram = rows @ rows.T
        total = gram if total is None else total.add_(gram)
    result: list[list[float]] = [] if total is None else total.tolist()
    return result


def cosine(gram: Sequence[Sequence[float]], one: int, other: int) -> float:
    """The cosine of the angle between two of the vectors; 1 where one has no length."""
    length = math.sqrt(gram[one][one] * gram[other][other])
    return gram[one][other] / length if length else 1.0


def count_nonzero(whole: Whole, scores: Scores) -> int:
    """How many elements of the first score are not 0, as float32."""
    return sum(int(torch.count_nonzero(scores(piece)[0].float())) for piece in whole)


def least_of_largest(whole: Whole, scores: Scores, count: int) -> list[float]:
    """For each of some scores, none negative, the least of its `count` largest elements; infinity for none.

    Scores are ranked as float32. The bits of such numbers have the numbers' order, so two passes that count the
    upper and then the lower halves of the bits find the element without sorting.
    """
    upper = _counted(whole, lambda piece: [_bits(score) >> 16 for score in scores(piece)])
    if count <= 0 or not upper:
        return [math.inf] * len(upper)
    found = [_place(counts, count) for counts in upper]

    def lower_bits(piece: Piece) -> list[torch.Tensor]:
        bits = [_bits(score) for score in scores(piece)]
        return [own[own >> 16 == half] & 0xFFFF for own, (half, _) in zip(bits, found, strict=True)]

    lower = _counted(whole, lower_bits)
    halves = [(half, _place(counts, left)[0]) for counts, (half, left) in zip(lower, found, strict=True)]
    values = torch.tensor([high << 16 | low for high, low in halves], dtype=torch.int32)
    return values.view(torch.float32).tolist()


def at_least(score: torch.Tensor, least: float) -> torch.Tensor:
    """A mask of the elements that are at least the one that `least_of_largest` found."""
    return score.float() >= least


def _bits(score: torch.Tensor) -> torch.Tensor:
    return score.reshape(-1).float().abs().view(torch.int32)  # a NaN may have a sign


def _counted(whole: Whole, halves: Scores) -> list[torch.Tensor]:
    """How often each number of 16 bits turns up, for each score."""
    totals: list[torch.Tensor] = []
    for piece in whole:
        counts = [torch.bincount(half, minlength=1 << 16) for half in halves(piece)]
        totals = [one.add_(other) for one, other in zip(totals, counts, strict=True)] if totals else counts
    return totals


def _place(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The number that the `wanted` largest reach down to, and how many of it are wanted."""
    reached = counts.flip(0).cumsum(0)
    steps = int(torch.searchsorted(reached, wanted))
    above = int(reached[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, wanted - above
