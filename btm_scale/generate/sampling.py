"""The decoding loop of a mixture of experts: sample a token, update the posterior, repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from btm_scale.errors import UserError
from btm_scale.generate.device_posterior import DevicePosterior
from btm_scale.generate.together import JointReading
from btm_scale.kernels import mix_logits, mix_sample

_DIVERGED = "An expert's logits contain NaN or exclude every token. Check for a diverged expert."

# (logits [experts, batch, vocabulary], log weights float64 [batch, experts]) -> tokens int64 [batch], and each expert's
# log-probability of them in nats, float64 [batch, experts]
Choice = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults sample from the mixture itself."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is {self.temperature}. It must be finite and at least 0, which takes the most likely "
                "token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}. It must be at least 1, which takes the most likely token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}. It must be a probability above 0 and at most 1.")

    @property
    def is_exact(self) -> bool:
        """Whether tokens are sampled from the mixture itself."""
        return self == Sampling()


@dataclass(frozen=True)
class Step:
    """The next token of each unfinished text."""

    texts: np.ndarray  # int64 [unfinished]
    tokens: np.ndarray  # int64 [unfinished]


def from_mixture(sampling: Sampling) -> Choice:
    """Sample from the mixture with temperature and optional top-k and top-p."""

    def choose(logits: Tensor, log_weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if sampling.is_exact and len(logits) == 1 and logits.device.type == "cpu":
            return _from_one_model(logits[0], generator), torch.zeros_like(log_weights)
        if sampling.temperature == 0 or (sampling.top_k is None and sampling.top_p is None):
            gains = torch.zeros_like(log_weights)
            tokens, _ = mix_sample(
                logits, log_weights, temperature=sampling.temperature, generator=generator, log_likelihood=gains
            )
            return tokens, gains
        scores = cut(mix_logits(logits, log_weights) / sampling.temperature, sampling.top_k, sampling.top_p)
        tokens, _ = mix_sample(scores.unsqueeze(0), torch.zeros_like(log_weights[:, :1]), generator=generator)
        return tokens, token_log_probs(logits, tokens)

    return choose


def _from_one_model(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample from logits [batch, vocabulary], as `mix_sample` does for one expert, which needs no normalization."""
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    best, tokens = torch.sub(logits, noise).max(1)
    return tokens.masked_fill_(~best.isfinite(), -1)


def from_drawn_expert(logits: Tensor, log_weights: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample an expert for each text by its weights, then a token from that expert; no mixture is formed."""
    drawn = torch.multinomial(log_weights.softmax(1), 1, generator=generator).squeeze(1)
    expert_logits = logits[drawn, torch.arange(len(drawn), device=drawn.device)]
    tokens, _ = mix_sample(expert_logits.unsqueeze(0), torch.zeros_like(log_weights[:, :1]), generator=generator)
    gains = token_log_probs(logits, tokens)
    # An expert that was not drawn may have diverged, too: no weight can be computed from its NaN.
    return tokens.masked_fill_(gains.isnan().any(1), -1), gains


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return each expert's log-probability in nats of tokens, int64 [batch], as float64 [batch, experts].

    Args: `logits` [experts, batch, vocabulary]. A token of -1, which no expert allows, gets any value.
    """
    wide = logits.double()
    chosen = tokens.clamp_min(0).expand(len(logits), -1).unsqueeze(2)
    gains = wide.gather(2, chosen).squeeze(2) - wide.logsumexp(2)
    return gains.clamp_(max=0.0).T


def cut(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set all but the `top_k` largest scores [batch, vocabulary], and those outside the `top_p` nucleus, to -inf."""
    if top_k is not None and top_k < scores.shape[1]:
        largest = scores.topk(top_k, dim=1)
        scores = torch.full_like(scores, -float("inf")).scatter(1, largest.indices, largest.values)
    if top_p is not None and top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True)
        probabilities = ordered.double().softmax(1)
        outside = probabilities.cumsum(1) - probabilities >= top_p
        scores = scores.masked_fill(outside.scatter(1, order, outside), -float("inf"))
    return scores


def decode(
    reading: JointReading,
    posterior: DevicePosterior,
    choose: Choice,
    *,
    limits: np.ndarray,
    end: int | None,
    finished: np.ndarray,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Continue the texts that all experts have read, until each has `limits` [texts] more tokens or the token `end`.

    `finished` bool [texts] is updated in place, and the caller may finish a text between two steps. Raises
    `FloatingPointError` if an expert's logits contain NaN or exclude every token.
    """
    finished |= limits < 1
    written = 0
    while not finished.all():
        tokens, gains = choose(reading.logits, posterior.log_weights(), generator)
        if posterior.experts > 1:  # a single expert always has weight 1
            posterior.observe(gains)
        written += 1
        arriving = HostCopy(tokens)
        # A GPU computes the next logits while the host turns these tokens into text.
        ahead = tokens.is_cuda and bool((limits[~finished] > written).any())
        if ahead:
            reading.feed(tokens.clamp_min(0))
        sampled = arriving.wait()
        refuse_no_token(sampled)
        active = np.flatnonzero(~finished)
        finished |= limits <= written
        if end is not None:
            finished |= sampled == end
        yield Step(active, sampled[active])
        if not ahead and not finished.all():
            reading.feed(tokens)


class HostCopy:
    """Tokens on their way to the host, beside what the GPU computes next."""

    def __init__(self, tokens: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> np.ndarray:
        """Return the tokens, int64 [texts]."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.numpy()


def refuse_no_token(tokens: np.ndarray) -> None:
    """Raise `FloatingPointError` for a negative token: an expert's logits contain NaN or exclude every token."""
    if (tokens < 0).any():
        raise FloatingPointError(_DIVERGED)


def refuse_nan(log_probs: np.ndarray) -> None:
    """Raise `FloatingPointError` if a log-probability is NaN, as those of a diverged expert are."""
    if np.isnan(log_probs).any():
        raise FloatingPointError(_DIVERGED)
