"""Perplexity by position in the sequence: whether a model uses a long context."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from btm_scale.evaluate.results import MAX_LOSS, ByPosition

_FIRST = 128  # tokens of the first range of positions


def range_ends(length: int) -> tuple[int, ...]:
    """Return the ends of ranges of positions in sequences of `length` tokens: 128, and each twice the one before."""
    doublings = max(0, math.ceil(math.log2(length / _FIRST)))
    return (*(_FIRST << doubling for doubling in range(doublings)), length)


def ranges_of(block_starts: np.ndarray, targets: int, ends: Sequence[int]) -> np.ndarray:
    """Return the range of each target's position in its block, int64 [targets].

    Args: `block_starts` [blocks], the first target of each; a position past the last end is in the last range.
    """
    sizes = np.diff([*block_starts, targets])
    positions = np.arange(targets) - np.repeat(block_starts, sizes)
    return np.searchsorted(ends[:-1], positions, side="right")


def perplexities(log_probs: np.ndarray, ranges: np.ndarray, count: int) -> tuple[float | None, ...]:
    """Return the perplexity in each of `count` ranges, from log-probabilities [targets] in nats.

    None for a range without targets, or with a loss whose perplexity no float can hold.
    """
    tokens = np.bincount(ranges, minlength=count)
    nats = np.bincount(ranges, -log_probs.astype(np.float64), minlength=count)
    losses = [total / number if number else math.inf for total, number in zip(nats, tokens, strict=True)]
    return tuple(math.exp(loss) if loss <= MAX_LOSS else None for loss in losses)


def as_result(
    ends: Sequence[int], by_domain: Mapping[str, Mapping[str, tuple[float | None, ...]]]
) -> ByPosition | None:
    """Return the part of results.json, from perplexities by domain and method; None for a single range."""
    if len(ends) == 1:
        return None
    methods: dict[str, dict[str, tuple[float | None, ...]]] = {}
    for domain, by_method in by_domain.items():
        for method, values in by_method.items():
            methods.setdefault(method, {})[domain] = values
    return ByPosition(ends=tuple(ends), perplexity=methods)
