"""The domain posterior of texts that are still being written: one step for each token, many texts side by side.

`posterior.mixture_log_probs` weighs a text that is there already; here the weights are wanted before the token is.
"""

from __future__ import annotations

import numpy as np

from btm_scale.forest.posterior.evidence import Mode, Tempering, logsumexp

Array = np.ndarray


class RunningPosterior:
    """log p(D=j | text so far), nats [texts, experts], from a prior on; all modes of `mixture_log_probs`."""

    def __init__(
        self, log_prior: Array, texts: int, *, mode: Mode = "prefix", tempering: Tempering | None = None
    ) -> None:
        """`log_prior` [experts] or [texts, experts] nats, normalised here; `tempering` is for the mode `tempered`."""
        if (tempering is not None) != (mode == "tempered"):
            raise ValueError("the mode 'tempered' takes a tempering, and no other mode does")
        prior = np.asarray(log_prior, dtype=np.float64)
        prior = np.broadcast_to(prior, (texts, prior.shape[-1]))
        self._prior = prior - logsumexp(prior.T)[:, None]
        self._state = self._prior
        self._mode = mode
        self._tempering = tempering or Tempering()

    def log_weights(self) -> Array:
        """Normalised, float64 [texts, experts]; the prior where every expert has ruled the text out."""
        return _normalised(self._state, self._prior)

    def observe(self, log_probs: Array, seen: Array | None = None) -> None:
        """Take in the experts' log-probabilities [texts, experts] of each text's next token.

        `seen` bool [texts]: only these texts have one.
        """
        new = self._after(np.asarray(log_probs, dtype=np.float64))
        self._state = new if seen is None else np.where(seen[:, None], new, self._state)

    def _after(self, log_probs: Array) -> Array:
        if self._mode == "fixed":
            return self._prior
        if self._mode == "token":
            return self._prior + log_probs
        if self._mode == "prefix":
            return _normalised(self._state + log_probs, self._prior, keep_lost=True)
        power, forgetting, share = self._tempering.power, self._tempering.forgetting, self._tempering.share
        state = _normalised(forgetting * self._state + power * log_probs, self._prior, keep_lost=True)
        if share > 0:
            state = np.logaddexp(np.log1p(-share) + state, np.log(share) + self._prior)
        return state


def _normalised(state: Array, prior: Array, *, keep_lost: bool = False) -> Array:
    """Each row's weights made to sum to 1. A lost row, of zeros only, is kept or replaced by the prior."""
    total = logsumexp(state.T)[:, None]
    lost = np.isneginf(total)
    return np.where(lost, state if keep_lost else prior, state - np.where(lost, 0.0, total))
