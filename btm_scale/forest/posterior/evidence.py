"""How what the experts said of earlier tokens moves their weights: one recursion over a text for each mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Mode = Literal["prefix", "token", "tempered", "fixed"]
Array = np.ndarray

_SMALLEST, _LARGEST = float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Tempering:
    """How evidence moves the weights in mode `tempered`.

    After each token log w <- forgetting x log w + power x log p, normalised; then a share of the prior is mixed in.
    Power and forgetting 1 with share 0 are the prefix posterior. A whole prefix is over-confident evidence: the
    experts' errors on neighbouring tokens are not independent.
    """

    power: float = 1.0
    forgetting: float = 1.0
    share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.power > 0 and 0 < self.forgetting <= 1 and 0 <= self.share < 1):
            raise ValueError(f"need power > 0, 0 < forgetting <= 1 and 0 <= share < 1, not {self}")


class Evidence:
    """The running log weights of `count` blocks under each tempering, side by side: [experts, temperings x count]."""

    def __init__(self, prior: Array, count: int, mode: Mode, temperings: Sequence[Tempering]) -> None:
        self._prior = np.repeat(prior[:, None], len(temperings) * count, axis=1)
        self._state = self._prior
        self._mode = mode
        # As large as what they are multiplied with, where every token asks for it: rows are short.
        self._power, self._forgetting, shares = (
            np.tile(np.repeat([getattr(tempering, name) for tempering in temperings], count), (len(prior), 1))
            for name in ("power", "forgetting", "share")
        )
        self._mixes = bool(shares[0, 0] > 0)
        # No share is so small that it rounds to nothing: the expert would be out for good.
        self._kept, self._mixed_in = 1 - shares[0], np.maximum(shares * np.exp(self._prior), _SMALLEST)

    def weights_before(self, piece: Array) -> Array:
        """Normalised log weights before each token of the blocks' next piece [experts, blocks, tokens]."""
        if self._mode == "tempered":
            joint = self._tempered(piece)
            if self._mixes:
                return joint
        else:
            joint = np.empty_like(piece)
        if self._mode == "fixed":
            joint[:] = self._prior[:, :, None]
        elif self._mode == "token":
            joint[:, :, 0] = self._state
            joint[:, :, 1:] = self._prior[:, :, None] + piece[:, :, :-1]
            self._state = self._prior + piece[:, :, -1]
        elif self._mode == "prefix":
            joint[:, :, 0] = self._state
            np.cumsum(piece[:, :, :-1], axis=2, out=joint[:, :, 1:])
            joint[:, :, 1:] += self._state[:, :, None]
            # Only differences count, so the state is kept small: a long stream loses no digits.
            self._state = _centred(joint[:, :, -1] + piece[:, :, -1])
        total = logsumexp(joint)
        lost = np.isneginf(total)
        if lost.any():
            # Where every expert has ruled the text out there is nothing to weigh by but the prior.
            blocks, tokens = np.nonzero(lost)
            joint[:, blocks, tokens] = self._prior[:, blocks]
            total[lost] = 0.0
        joint -= total
        return joint

    def _tempered(self, piece: Array) -> Array:
        """Log weights before each token; where a share of the prior is mixed in, they are normalised."""
        text = np.moveaxis(piece, 2, 0)
        before, news, state = np.empty_like(text), np.empty_like(self._state), self._state.copy()
        for token, log_probs in enumerate(text):
            before[token] = state
            state *= self._forgetting
            state += np.multiply(self._power, log_probs, out=news)
            if self._mixes:
                self._mix_in_prior(state)
        self._state = state if self._mixes else _centred(state)
        return np.moveaxis(before, 0, 2)

    def _mix_in_prior(self, state: Array) -> None:
        """In place; the weights then sum to 1. Beside a share of the prior, what underflows is nothing."""
        state -= np.maximum(state.max(axis=0), -_LARGEST)
        np.exp(state, out=state)
        total = state.sum(axis=0)
        if not total.all():
            # Every expert has ruled the text out: the prior alone is left.
            lost = total == 0
            state[:, lost] = np.exp(self._prior[:, lost])
            total[lost] = 1.0
        state *= self._kept / total
        state += self._mixed_in
        np.log(state, out=state)


def logsumexp(values: Array) -> Array:
    """Over the first dimension; -inf where all are -inf."""
    peak = values.max(axis=0)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    shifted = values - safe
    np.exp(shifted, out=shifted)
    with np.errstate(divide="ignore"):
        return safe + np.log(shifted.sum(axis=0))


def _centred(state: Array) -> Array:
    peak = state.max(axis=0)
    return state - np.where(np.isfinite(peak), peak, 0.0)
