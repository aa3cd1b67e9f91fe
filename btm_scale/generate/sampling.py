"""The next token of a mixture of experts, over and over: which one is taken, and what the posterior makes of it."""

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
    """How a token is taken from the mixture's distribution; as it stands, drawn from it unchanged."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: it must be at least 0; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k {self.top_k}: at least 1 token must be left; 1 takes the likeliest")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p}: it is a share of the probability, above 0 and at most 1")

    @property
    def is_exact(self) -> bool:
        """Whether tokens are drawn from the mixture itself."""
        return self == Sampling()


@dataclass(frozen=True)
class Step:
    """One more token of each text that isn't finished."""

    texts: np.ndarray  # int64 [unfinished]
    tokens: np.ndarray  # int64 [unfinished]


def from_mixture(sampling: Sampling) -> Choice:
    """Take tokens from the mixture over the vocabulary, at any temperature, cut or whole."""

    def choose(logits: Tensor, log_weights: Tensor, generator: torch.Generator) -> Tensor:
        if sampling.temperature == 0 or (sampling.top_k is None and sampling.top_p is None):
            tokens, _ = mix_sample(logits, log_weights, temperature=sampling.temperature, generator=generator)
            return tokens
        scores = cut(mix_logits(logits, log_weights) / sampling.temperature, sampling.top_k, sampling.top_p)
        return mix_sample(scores.unsqueeze(0), torch.zeros_like(log_weights[:, :1]), generator=generator)[0]

    return choose


def from_drawn_expert(logits: Tensor, log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an expert for each text by its weights, then a token from that expert alone: no mixture is formed."""
    drawn = torch.multinomial(log_weights.exp(), 1, generator=generator).squeeze(1)
    chosen = logits[drawn, torch.arange(len(drawn), device=drawn.device)]
    return mix_sample(chosen.unsqueeze(0), torch.zeros_like(log_weights[:, :1]), generator=generator)[0]


def cut(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Rule out (-inf) all but the top_k largest of scores [batch, vocabulary], then all but the fewest of the largest
    whose probabilities reach top_p."""
    if top_k is not None and top_k < scores.shape[1]:
        kept = scores.topk(top_k, dim=1)
        scores = torch.full_like(scores, -float("inf")).scatter(1, kept.indices, kept.values)
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
    """Write the texts that all experts have read, until each has `limits` [texts] tokens more or the token `end`.

    `finished` bool [texts] is kept up to date, and the caller may finish a text between two steps.
    """
    finished |= limits < 1
    made = 0
    while not finished.all():
        logits = torch.stack([reading.logits for reading in readings])
        weights = torch.as_tensor(posterior.log_weights(), dtype=torch.float32, device=logits.device)
        tokens = choose(logits, weights, generator)
        if (tokens < 0).any():
            raise FloatingPointError("an expert's logits hold NaN or rule out every token: look for a diverged expert")
        if len(readings) > 1:  # one expert's weight is 1 whatever it says
            gains = [reading.next_log_probs(tokens) for reading in readings]
            posterior.observe(torch.stack(gains, dim=1).cpu().numpy())
        made += 1
        written = tokens.cpu().numpy()
        going = np.flatnonzero(~finished)
        finished |= limits <= made
        if end is not None:
            finished |= written == end
        yield Step(going, written[going])
        if not finished.all():
            for reading in readings:
                reading.feed(tokens)
