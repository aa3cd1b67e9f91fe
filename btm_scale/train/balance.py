"""Which sequences of a step each data rank trains on, so that all have equal work when documents are separate.

A step's sequences depend on the seed and the step alone, whatever the layout. With separate documents, attention costs
a sequence about the sum of its documents' squared lengths, and the ranks wait for the one with the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from btm_scale.train.mixture import DomainMixture

Array = np.ndarray[Any, Any]


class RankText:
    """The sequences of one of `ranks` data ranks: with `balances`, by their work; otherwise, a contiguous part."""

    def __init__(
        self, mixture: DomainMixture, *, rank: int, ranks: int, balances: bool, window: int | None = None
    ) -> None:
        self._mixture = mixture
        self._rank, self._ranks = rank, ranks
        self._balances = balances and ranks > 1
        self._window = window

    def read(self, first: int, count: int) -> Tensor:
        """Return this rank's sequences of a step of `count` samples from index `first` on, [count / ranks, length]."""
        return self._mixture.select(first, self._own(first, count))

    def domains(self, first: int, count: int) -> list[str]:
        """Return the domain of each of the sequences that `read` returns."""
        return self._mixture.domains(first, self._own(first, count))

    def _own(self, first: int, count: int) -> Sequence[int]:
        """Return which samples of a step are this rank's, as offsets from `first`."""
        if not self._balances:
            share = count // self._ranks
            return range(self._rank * share, (self._rank + 1) * share)
        documents = self._mixture.document_lengths(first, count)
        work = [attended_pairs(lengths, self._window) for lengths in documents]
        return balanced(work, self._ranks)[self._rank]


def attended_pairs(lengths: Array, window: int | None = None) -> int:
    """Return the number of pairs of a query and a key in documents of these lengths."""
    near = lengths if window is None else np.minimum(lengths, window)
    return int((near * (near + 1) // 2 + (lengths - near) * near).sum())


def balanced(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Return which items each rank gets: equally many, with about equal work in all, and in each turn.

    The most expensive items are given out first, one per rank, the largest of each turn to the rank with the least so
    far. So the ranks' micro-batches, which follow this order, have about equal work, too. `ranks` divides the items.
    """
    order = np.argsort(-np.asarray(work, dtype=np.float64), kind="stable").tolist()
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for turn in range(0, len(order), ranks):
        by_total = sorted(range(ranks), key=totals.__getitem__)
        for rank, item in zip(by_total, order[turn : turn + ranks], strict=True):
            shares[rank].append(item)
            totals[rank] += work[item]
    return shares
