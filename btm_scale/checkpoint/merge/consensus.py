"""Sign election: the elementwise agreement of models' differences from the base (TIES, arXiv 2306.01708)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

from btm_scale.checkpoint.merge.arrays import as_numbers
from btm_scale.util.imports import torch

_SMALLEST_SUM = 1e-8


def total_of(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors, added in order."""
    return functools.reduce(operator.add, parts)


def divisor(weights: Sequence[float]) -> float:
    """Return the sum of the weights to divide by, or 1 if it is zero."""
    total = sum(weights)
    return total if abs(total) >= _SMALLEST_SUM else 1.0


def agreeing(deltas: Sequence[torch.Tensor], total: torch.Tensor) -> list[torch.Tensor]:
    """Return, for every model, 1 where its difference has the sign of the total and 0 elsewhere."""
    is_positive = total >= 0
    return [as_numbers(((delta > 0) & is_positive) | ((delta < 0) & ~is_positive)) for delta in deltas]


def mean_of(
    weighted: Sequence[torch.Tensor], weights: Sequence[float], agrees: Sequence[torch.Tensor], normalize: float = 1.0
) -> torch.Tensor:
    """Return the sum of the agreeing weighted differences, 0 where none agrees.

    With `normalize` it is divided by the weights of the models that agree.
    """
    kept = total_of(delta * mask for delta, mask in zip(weighted, agrees, strict=True))
    if not normalize:
        return kept
    weight = total_of(w * mask for w, mask in zip(weights, agrees, strict=True))
    return kept / (weight + (weight == 0))


def elected(deltas: Sequence[torch.Tensor], weights: Sequence[float], normalize: float) -> torch.Tensor:
    """Return the sum or mean of the weighted differences that have the sign of their sum."""
    weighted = [weight * delta for delta, weight in zip(deltas, weights, strict=True)]
    return mean_of(weighted, weights, agreeing(weighted, total_of(weighted)), normalize)


def weighted_sum(deltas: Sequence[torch.Tensor], weights: Sequence[float], normalize: float) -> torch.Tensor:
    """Return the weighted sum of the differences, with `normalize` divided by the sum of the weights."""
    total = total_of(weight * delta for delta, weight in zip(deltas, weights, strict=True))
    return total / divisor(weights) if normalize else total
