"""Merge methods that select or scale a model's differences by statistics of the full tensor."""

from __future__ import annotations

from btm_scale.checkpoint.merge.consensus import total_of
from btm_scale.checkpoint.merge.registry import Merge, Piece, TensorPieces, method
from btm_scale.checkpoint.merge.statistics import at_least, least_of_largest
from btm_scale.util.imports import torch

_SMALLEST_PROBABILITY = 1e-8
_QUARTILES = (0.25, 0.5, 0.75)


@method(elementwise=False, needs_base=True, weighted=False, exactly=1)
def arcee_fusion(pieces: TensorPieces) -> Merge:
    """Take the model's elements of outstanding importance, the rest from the base (by Arcee, in mergekit).

    Importance is the difference times the row's divergence KL(softmax(model) || softmax(base)). An element is taken
    from the median plus 1.5 times the interquartile range.
    """
    # The element at this position of the ascending order, counted from the largest.
    counts = [pieces.elements - int(quartile * (pieces.elements - 1)) for quartile in _QUARTILES]
    first, median, third = least_of_largest(pieces, lambda piece: [_importance(piece)] * 3, counts)
    least = median + 1.5 * (third - first)

    def merged(piece: Piece) -> torch.Tensor:
        # Both read the models, which a piece gives once.
        (model,) = piece.copies()
        return piece.origin + (model - piece.origin) * at_least(_divergence(model, piece.origin), least)

    return merged


def _importance(piece: Piece) -> torch.Tensor:
    (model,) = piece.copies()
    return _divergence(model, piece.origin)


def _divergence(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    p, q = (tensor.softmax(dim=-1).add_(_SMALLEST_PROBABILITY) for tensor in (model, base))
    # Never negative, except by rounding.
    rows = (p * (p / q).log()).sum(dim=-1, keepdim=True).clamp(min=0)
    return (model - base).abs() * rows


@method(elementwise=False, needs_base=True, weighted=False)
def ramplus_tl(pieces: TensorPieces, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Merge:
    """As `ram`, with a model's unshared differences enlarged by its ratio of shared to unshared (arXiv 2601.13572).

    The factor is `1 + r * min(ratio, alpha)`, measured per tensor.
    """
    counts: torch.Tensor | None = None  # [2, models]: shared and unshared elements
    for piece in pieces:
        moved, number = _moved(piece.deltas(), epsilon)
        part = torch.stack(
            [torch.stack([(mask & which).sum() for mask in moved]) for which in (number > 1, number == 1)]
        )
        counts = part if counts is None else counts + part
    assert counts is not None
    ratios = counts[0] / counts[1].double().clamp(min=epsilon)
    factors = (1 + r * ratios.clamp(0, alpha)).tolist()

    def merged(piece: Piece) -> torch.Tensor:
        deltas = piece.deltas()
        moved, number = _moved(deltas, epsilon)
        return piece.origin + total_of(
            delta * mask * torch.where(number == 1, factor, 1 / number.clamp(min=1).double())
            for delta, mask, factor in zip(deltas, moved, factors, strict=True)
        )

    return merged


def _moved(deltas: list[torch.Tensor], epsilon: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return which elements moved in each model, and in how many models each did."""
    moved = [delta.abs() > epsilon for delta in deltas]
    return moved, torch.stack(moved).sum(dim=0)
