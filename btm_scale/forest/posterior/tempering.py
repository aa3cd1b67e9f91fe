"""Fit the tempered posterior's three parameters to the likelihood of dev text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.mixture import tempered_mixtures

# The search grid. The effect of the power depends on the forgetting, so the search also moves along diagonals.
_POWERS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0)
_FORGETTINGS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)
_SHARES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4)
_Point = tuple[int, int, int]
_START: _Point = (_POWERS.index(0.2), _FORGETTINGS.index(0.97), 0)


def fitted_tempering(
    log_probs: np.ndarray, block_starts: np.ndarray, log_prior: np.ndarray, counted: np.ndarray | None = None
) -> Tempering:
    """Return the tempering with the highest likelihood of dev text, found by hill climbing on a grid.

    Args: `log_probs` [experts, tokens] and `log_prior` [experts] in nats, `block_starts` [blocks], and `counted`, the
    tokens whose likelihood it is, bool [tokens] (default: all).
    """

    likelihoods: dict[_Point, float] = {}
    best, before = _START, None
    while best != before:
        before = best
        points = [best, *_neighbours(best)]
        new = [point for point in points if point not in likelihoods]
        if new:
            mixed = tempered_mixtures(log_probs, block_starts, list(map(_at, new)), log_prior=log_prior)
            mixed = mixed if counted is None else mixed[:, counted]
            likelihoods.update(zip(new, mixed.mean(axis=1).tolist(), strict=True))
        best = max(points, key=likelihoods.__getitem__)
    return _at(best)


def _at(point: _Point) -> Tempering:
    return Tempering(power=_POWERS[point[0]], forgetting=_FORGETTINGS[point[1]], share=_SHARES[point[2]])


def _neighbours(point: _Point) -> Iterator[_Point]:
    ends = (len(_POWERS), len(_FORGETTINGS), len(_SHARES))
    for step in product((-1, 0, 1), repeat=3):
        power, forgetting, share = (place + move for place, move in zip(point, step, strict=True))
        if all(0 <= place < end for place, end in zip((power, forgetting, share), ends, strict=True)):
            yield power, forgetting, share
