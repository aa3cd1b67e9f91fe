"""The posterior's recursion: how log-probabilities of earlier tokens update the experts' weights, in each mode.

`Evidence` processes existing texts, many tokens at once; `RunningPosterior` texts that are being generated, where the
weights are needed before the token is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.log_weights import centred, logsumexp, normalise

Mode = Literal["prefix", "token", "tempered", "fixed"]
Array = np.ndarray

_SMALLEST, _LARGEST = float(np.finfo(np.float64).tiny), float(np.finfo(np.float64).max)
UNTEMPERED = Tempering(power=1.0)  # the prefix posterior
_BY_TEXT = ("_prior", "_state", "_power", "_forgetting", "_kept", "_mixed_in")  # with the texts as last dimension


class Evidence:
    """The running log weights of `count` texts under each tempering, side by side: [experts, temperings x count].

    `prior` [experts], or [experts, count] if it differs between texts, in nats and normalised.
    """

    def __init__(self, prior: Array, count: int, mode: Mode, temperings: Sequence[Tempering]) -> None:
        priors = np.broadcast_to(prior if prior.ndim == 2 else prior[:, None], (len(prior), count))
        self._prior = np.tile(priors, (1, len(temperings)))
        self._state = self._prior
        self._mode = mode
        # Expanded to the shape of their operands: rows are short, and broadcasting for every token is slow.
        self._power, self._forgetting, shares = (
            np.tile(np.repeat([getattr(tempering, name) for tempering in temperings], count), (len(prior), 1))
            for name in ("power", "forgetting", "share")
        )
        self._mixes = mode == "tempered" and bool(shares[0, 0] > 0)
        # A share must not underflow to 0: the expert could never recover.
        mixed_in = np.maximum(shares * np.exp(self._prior), _SMALLEST)
        self._kept, self._mixed_in = 1 - shares[0], np.where(np.isneginf(self._prior), 0.0, mixed_in)

    @property
    def is_sum(self) -> bool:
        """Whether all that counts of several tokens is the sum of their log-probabilities."""
        return self._mode == "prefix"

    def weights(self) -> Array:
        """Return normalised log weights before the next token [experts, temperings x count]."""
        return normalise(self._state.copy(), self._prior)

    def observe(self, log_probs: Array, seen: Array | None = None) -> None:
        """Update the texts `seen` with the log-probabilities [experts, temperings x count] of their next token."""
        before = self._state
        if self._mode == "token":
            self._state = self._prior + log_probs
        elif self._mode == "prefix":
            self._state = centred(before + log_probs)
        elif self._mode == "tempered":
            state = before.copy()
            self._temper(state, log_probs, np.empty_like(state))
            self._state = state if self._mixes else centred(state)
        if seen is not None:
            self._state = np.where(seen, self._state, before)

    def keep(self, texts: Sequence[int]) -> None:
        """Keep only these texts, which may repeat, in this order. Needs a single tempering."""
        for name in _BY_TEXT:
            setattr(self, name, getattr(self, name)[..., list(texts)])

    def join(self, other: Evidence) -> None:
        """Append the texts of another instance with the same mode and tempering."""
        for name in _BY_TEXT:
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)], axis=-1))

    def arrays(self) -> RecursionArrays:
        """Return what a recursion elsewhere needs. Needs a single tempering."""
        transposed = (self._prior, self._state, self._power, self._forgetting)
        prior, state, power, forgetting = (array.T for array in transposed)
        kept, mixed_in = self._kept[:, None], self._mixed_in.T
        return RecursionArrays(self._mode, self._mixes, prior, state, power, forgetting, kept, mixed_in)

    def weights_before(self, piece: Array) -> Array:
        """Return normalised log weights before each token of the next piece [experts, texts, tokens]; consumes it."""
        if self._mode == "tempered":
            joint = self._tempered(piece)
            return joint if self._mixes else normalise(joint, self._prior)
        joint = np.empty_like(piece)
        if self._mode == "fixed":
            joint[:] = self._prior[:, :, None]
        elif self._mode == "token":
            joint[:, :, 0] = self._state
            joint[:, :, 1:] = self._prior[:, :, None] + piece[:, :, :-1]
            self.observe(piece[:, :, -1])
        elif self._mode == "prefix":
            joint[:, :, 0] = self._state
            np.cumsum(piece[:, :, :-1], axis=2, out=joint[:, :, 1:])
            joint[:, :, 1:] += self._state[:, :, None]
            self._state = joint[:, :, -1]
            self.observe(piece[:, :, -1])
        return normalise(joint, self._prior)

    def _tempered(self, piece: Array) -> Array:
        """Return log weights before each token; they are normalised if the prior is mixed in."""
        text = np.moveaxis(piece, 2, 0)
        before, scratch, state = np.empty_like(text), np.empty_like(self._state), self._state.copy()
        for token, log_probs in enumerate(text):
            before[token] = state
            self._temper(state, log_probs, scratch)
        self._state = state if self._mixes else centred(state)
        return np.moveaxis(before, 0, 2)

    def _temper(self, state: Array, log_probs: Array, scratch: Array) -> None:
        """Update `state` in place with one more token; `scratch` is a work buffer."""
        state *= self._forgetting
        state += np.multiply(self._power, log_probs, out=scratch)
        if self._mixes:
            self._mix_in_prior(state)

    def _mix_in_prior(self, state: Array) -> None:
        """Mix the prior into `state` in place and normalise. Weights that underflow are negligible by comparison."""
        state -= np.maximum(state.max(axis=0), -_LARGEST)
        np.exp(state, out=state)
        total = state.sum(axis=0)
        if not total.all():
            # No expert assigns the text any probability: fall back to the prior.
            lost = total == 0
            state[:, lost] = np.exp(self._prior[:, lost])
            total[lost] = 1.0
        state *= self._kept / total
        state += self._mixed_in
        with np.errstate(divide="ignore"):  # experts with prior 0
            np.log(state, out=state)


class RecursionArrays(NamedTuple):
    """What the recursion of a single tempering computes with, [texts, experts] each, to continue it elsewhere."""

    mode: Mode
    mixes: bool  # whether the prior is mixed in
    prior: Array
    state: Array
    power: Array
    forgetting: Array
    kept: Array  # [texts, 1]
    mixed_in: Array


class RunningPosterior:
    """log p(D=j | text so far) in nats [texts, experts], token by token, in all modes of `mixture_log_probs`."""

    def __init__(
        self, log_prior: Array, texts: int, *, mode: Mode = "prefix", tempering: Tempering | None = None
    ) -> None:
        """Args: `log_prior` [experts] or [texts, experts] in nats, normalised here; `tempering` for mode `tempered`."""
        prior = np.asarray(log_prior, dtype=np.float64).T
        self._evidence = Evidence(prior - logsumexp(prior), texts, mode, [checked_tempering(mode, tempering)])

    def observe_text(self, log_probs: Array, seen: Array) -> None:
        """Update with several tokens of each text, [texts, tokens, experts] and `seen`, bool [texts, tokens]."""
        if self._evidence.is_sum:
            self.observe(np.where(seen[:, :, None], log_probs, 0.0).sum(axis=1))
            return
        for position in range(log_probs.shape[1]):
            self.observe(log_probs[:, position], seen[:, position])

    def log_weights(self) -> Array:
        """Return normalised log weights, float64 [texts, experts]; the prior if no expert allows the text."""
        return np.ascontiguousarray(self._evidence.weights().T)

    def observe(self, log_probs: Array, seen: Array | None = None) -> None:
        """Update with the experts' log-probabilities [texts, experts] of each text's next token.

        `seen`, bool [texts]: the texts that have a next token (default: all).
        """
        self._evidence.observe(np.asarray(log_probs, dtype=np.float64).T, seen)

    def arrays(self) -> RecursionArrays:
        """Return the recursion's arrays, which must not be changed."""
        return self._evidence.arrays()

    def keep(self, texts: Sequence[int]) -> None:
        """Keep only these texts, which may repeat, in this order."""
        self._evidence.keep(texts)

    def join(self, other: RunningPosterior) -> None:
        """Append the texts of another posterior over the same experts, in the same mode."""
        self._evidence.join(other._evidence)


def checked_tempering(mode: Mode, tempering: Tempering | None) -> Tempering:
    """Return the tempering of a mode. Raises ValueError if `tempered` has none, or another mode has one."""
    if (tempering is not None) != (mode == "tempered"):
        raise ValueError("mode 'tempered' requires a tempering, and no other mode accepts one")
    return tempering or UNTEMPERED
