"""The running posterior where the logits are, in float64: no step of decoding waits for the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from btm_scale.forest.posterior.evidence import Mode, RunningPosterior

# exp() of it is 0. An expert with this log weight is still read, so that it gets a log-probability for the token.
_NEGLIGIBLE = -1e4
_BY_TEXT = ("_prior", "_state", "_power", "_forgetting", "_kept", "_mixed_in")


class DevicePosterior:
    """log p(D=j | text so far) in nats [texts, experts] of texts that are generated; continues a `RunningPosterior`."""

    def __init__(self, running: RunningPosterior, device: torch.device | str) -> None:
        arrays = running.arrays()
        self.mode: Mode = arrays.mode

        def moved(values: Any) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float64).to(device).contiguous()

        self._prior, self._state = moved(arrays.prior), moved(arrays.state)
        self._power, self._forgetting = moved(arrays.power), moved(arrays.forgetting)
        self._kept, self._mixed_in = moved(arrays.kept), moved(arrays.mixed_in)
        self._mixes = arrays.mixes
        # Texts that no expert allows keep the prior. A token that is sampled never makes more of them.
        self._may_be_lost = bool((arrays.state.max(axis=1) == -float("inf")).any())

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self._state.shape[1]

    def log_weights(self) -> Tensor:
        """Return float64 [texts, experts] before the next token, not normalised; -inf for experts with prior 0."""
        if self.mode == "fixed":
            return self._prior
        weights = self._state
        if self._may_be_lost:
            lost = (weights == -float("inf")).all(1, keepdim=True)
            weights = torch.where(lost, self._prior, weights)
        if self.mode != "token":
            return weights
        return weights.clamp_min(_NEGLIGIBLE).masked_fill_(self._prior == -float("inf"), -float("inf"))

    def observe(self, log_probs: Tensor) -> None:
        """Update with the experts' log-probabilities, float64 [texts, experts], of each text's next token."""
        if self.mode == "prefix":
            self._state = self._state + log_probs
        elif self.mode == "token":
            self._state = self._prior + log_probs
        elif self.mode == "tempered":
            state = self._state * self._forgetting + self._power * log_probs
            self._state = self._mixed(state) if self._mixes else state - _finite(state.amax(1, keepdim=True))

    def keep(self, texts: Sequence[int]) -> None:
        """Keep only these texts, which may repeat, in this order."""
        index = torch.as_tensor(list(texts), device=self._state.device)
        for name in _BY_TEXT:
            setattr(self, name, getattr(self, name)[index])

    def join(self, other: DevicePosterior) -> None:
        """Append the texts of another posterior over the same experts, in the same mode."""
        for name in _BY_TEXT:
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))
        self._may_be_lost |= other._may_be_lost

    def _mixed(self, state: Tensor) -> Tensor:
        """Return the state with the prior mixed in, normalised."""
        weights = (state - _finite(state.amax(1, keepdim=True))).exp()
        total = weights.sum(1, keepdim=True)
        weights = torch.where(total == 0, self._prior.exp(), weights / total)
        return (weights * self._kept + self._mixed_in).log()


def _finite(peak: Tensor) -> Tensor:
    return torch.where(peak == -float("inf"), 0.0, peak)
