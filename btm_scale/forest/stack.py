"""The scores of several models on one text, side by side: all that a mixture is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.errors import ForestError
from btm_scale.forest.prior import cached_prior
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import RunDir


@dataclass(frozen=True)
class Stack:
    """Log-probabilities [models, tokens] in nats, and where blocks start [blocks]."""

    log_probs: np.ndarray
    block_starts: np.ndarray

    @classmethod
    def load(cls, run: RunDir, models: Sequence[str], domain: str, split: str) -> Stack:
        """Read every model's scores. Raises ForestError if one is missing or is of another text."""
        scores = [Scores.load(run.scores(model, domain, split)) for model in models]
        for model, other in zip(models, scores, strict=True):
            if other.fingerprint != scores[0].fingerprint:
                raise ForestError(
                    f"'{model}' and '{models[0]}' were scored on different texts of '{domain}'; "
                    "delete both models' scores and score them again: btm-scale score RUN"
                )
        return cls(np.stack([other.log_probs for other in scores]), scores[0].block_starts)

    @classmethod
    def joined(cls, stacks: Sequence[Stack]) -> Stack:
        """Texts one after the other, under the same models."""
        offsets = np.cumsum([0, *(stack.log_probs.shape[1] for stack in stacks[:-1])])
        starts = [stack.block_starts + offset for stack, offset in zip(stacks, offsets, strict=True)]
        return cls(np.concatenate([stack.log_probs for stack in stacks], axis=1), np.concatenate(starts))


def dev_prior(run: RunDir, models: Sequence[str], domain: str) -> np.ndarray:
    """log p(D=j) of a domain, nats [models]: the cached prior of its dev text."""
    dev = Stack.load(run, models, domain, "dev")
    return cached_prior(dev.log_probs, dev.block_starts)
