"""A batch of texts that join and leave between steps, each with its own sampling (continuous batching).

It has the decoding step of `decode`; what differs is that the texts of a batch change. transformers' continuous
batching has one random state for all requests, so that no seed repeats a text, and returns no alternatives to a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.device_posterior import DevicePosterior
from btm_scale.generate.sampling import Sampling, from_mixture, refuse_no_token
from btm_scale.generate.together import JointReading
from btm_scale.kernels import mix_logits


@dataclass(frozen=True)
class Alternatives:
    """The log-probability of a token in nats, and the most likely tokens in its place with theirs."""

    log_prob: float
    most_likely: tuple[tuple[int | str, float], ...] = ()  # ids, or texts from an engine that returns no ids


@dataclass
class Row:
    """How one text is sampled."""

    sampling: Sampling = field(default_factory=Sampling)
    random: torch.Generator | None = None  # default: the generator of the batch
    top: int | None = None  # record the log-probability of each token, and of this many alternatives
    owner: Any = None  # of the caller


class RunningBatch:
    """Texts that continue together under one model, or under the mixture of several."""

    def __init__(self, random: torch.Generator) -> None:
        self.rows: list[Row] = []
        self._random = random
        self._reading: JointReading | None = None
        self._posterior: DevicePosterior | None = None

    def join(self, reading: JointReading, posterior: RunningPosterior, rows: Sequence[Row]) -> None:
        """Add texts that every model has read; `reading` must not be used any more."""
        more = DevicePosterior(posterior, reading.device)
        if self._reading is None or self._posterior is None or not self.rows:
            self._reading, self._posterior = reading, more
        else:
            self._reading.join(reading)
            self._posterior.join(more)
        self.rows = [*self.rows, *rows]

    def sample(self) -> tuple[Tensor, list[Alternatives | None]]:
        """Return the next token of each text, int64 [rows], and its alternatives where a row asks for them.

        Raises `FloatingPointError` if a model's logits contain NaN or exclude every token.
        """
        assert self._reading is not None
        assert self._posterior is not None
        logits, weights = self._reading.logits, self._posterior.log_weights()
        alike = list(self._alike())
        if len(alike) == 1:
            sampling, random, _ = alike[0]
            tokens, gains = from_mixture(sampling)(logits, weights, random)
        else:
            tokens = torch.empty(len(self.rows), dtype=torch.int64, device=logits.device)
            gains = torch.empty_like(weights)
            for sampling, random, texts in alike:
                tokens[texts], gains[texts] = from_mixture(sampling)(logits[:, texts], weights[texts], random)
        refuse_no_token(tokens.cpu().numpy())  # before a negative token is an index
        alternatives = self._alternatives(logits, weights, tokens)
        if self._posterior.experts > 1:
            self._posterior.observe(gains)
        return tokens, alternatives

    def advance(self, tokens: Tensor, kept: Sequence[int]) -> None:
        """Continue the texts `kept` after their tokens, int64 [rows], and drop the others."""
        assert self._reading is not None
        assert self._posterior is not None
        if len(kept) < len(self.rows):
            self.rows = [self.rows[row] for row in kept]
            if not kept:
                self._reading, self._posterior = None, None
                return
            self._reading = self._reading.select(kept)
            self._posterior.keep(kept)
            tokens = tokens[list(kept)]
        self._reading.feed(tokens)

    def _alike(self) -> Iterator[tuple[Sampling, torch.Generator, list[int]]]:
        """Yield rows that are sampled in one call: with the same settings and the same random generator."""
        groups: dict[tuple[Sampling, int], list[int]] = {}
        for number, row in enumerate(self.rows):
            groups.setdefault((row.sampling, id(row.random)), []).append(number)
        for (sampling, _), numbers in groups.items():
            yield sampling, self.rows[numbers[0]].random or self._random, numbers

    def _alternatives(self, logits: Tensor, weights: Tensor, tokens: Tensor) -> list[Alternatives | None]:
        found: list[Alternatives | None] = [None] * len(self.rows)
        asked = [number for number, row in enumerate(self.rows) if row.top is not None]
        if asked:
            mixed = mix_logits(logits[:, asked], weights[asked])
            top = max(self.rows[number].top or 0 for number in asked)
            for number, one in zip(asked, alternatives_of(mixed, tokens[asked], top), strict=True):
                found[number] = Alternatives(one.log_prob, one.most_likely[: self.rows[number].top])
        return found


def alternatives_of(log_probs: Tensor, tokens: Tensor, top: int) -> list[Alternatives]:
    """Return the log-probability of each token [positions] and the `top` largest of `log_probs` [positions, vocab]."""
    largest = log_probs.topk(min(top, log_probs.shape[1]), dim=1)
    chosen = log_probs.gather(1, tokens[:, None]).squeeze(1).tolist()
    return [
        Alternatives(value, tuple(zip(ids, values, strict=True)))
        for value, ids, values in zip(chosen, largest.indices.tolist(), largest.values.tolist(), strict=True)
    ]
