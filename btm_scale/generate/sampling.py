"""The decoding loop of a mixture of experts: sample a token, update the posterior, repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from btm_scale.errors import UserError
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.kernels import mix_logits, mix_sample
from btm_scale.model.hf_decoder import Reading

# (logits [experts, batch, vocabulary], log weights [batch, experts]) -> tokens int64 [batch]
Choice = Callable[[Tensor, Tensor, torch.Generator], Tensor]


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

    def choose(logits: Tensor, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        if sampling.temperature == 0 or (sampling.top_k is None and sampling.top_p is None):
            tokens, _ = mix_sample(logits, log_weights, temperature=sampling.temperature, generator=generator)
            return tokens
        scores = cut(mix_logits(logits, log_weights) / sampling.temperature, sampling.top_k, sampling.top_p)
        return mix_sample(scores.unsqueeze(0), torch.zeros_like(log_weights[:, :1]), generator=generator)[0]

    return choose


def from_drawn_expert(logits: Tensor, log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Sample an expert for each text by its weights, then a token from that expert; no mixture is formed."""
    drawn = torch.multinomial(log_weights.exp(), 1, generator=generator).squeeze(1)
    expert_logits = logits[drawn, torch.arange(len(drawn), device=drawn.device)]
    return mix_sample(expert_logits.unsqueeze(0), torch.zeros_like(log_weights[:, :1]), generator=generator)[0]


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
    readings: Sequence[Reading],
    posterior: RunningPosterior,
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
        logits, weights = predictions(readings, posterior)
        tokens = choose(logits, weights, generator)
        observe(readings, posterior, tokens)
        written += 1
        sampled = tokens.cpu().numpy()
        active = np.flatnonzero(~finished)
        finished |= limits <= written
        if end is not None:
            finished |= sampled == end
        yield Step(active, sampled[active])
        if not finished.all():
            for reading in readings:
                reading.feed(tokens)


def predictions(readings: Sequence[Reading], posterior: RunningPosterior) -> tuple[Tensor, Tensor]:
    """Return the next token's logits [experts, batch, vocabulary], and the log weights [batch, experts] in nats."""
    logits = torch.stack([reading.logits for reading in readings])
    return logits, torch.as_tensor(posterior.log_weights(), dtype=torch.float32, device=logits.device)


def observe(readings: Sequence[Reading], posterior: RunningPosterior, tokens: Tensor) -> None:
    """Update the posterior with each text's next token, int64 [batch].

    Raises `FloatingPointError` for a negative one: an expert's logits contain NaN or exclude every token.
    """
    if (tokens < 0).any():
        raise FloatingPointError("An expert's logits contain NaN or exclude every token. Check for a diverged expert.")
    if len(readings) > 1:  # a single expert always has weight 1
        gains = [reading.next_log_probs(tokens) for reading in readings]
        posterior.observe(torch.stack(gains, dim=1).cpu().numpy())
