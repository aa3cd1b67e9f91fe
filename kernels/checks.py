"""Argument checks of the public functions. All raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_heads(hidden: Tensor, heads: Sequence[Tensor], targets: Tensor) -> None:
    """Check hidden states [experts, tokens, hidden] with one head per expert."""
    if hidden.ndim != 3 or len(heads) != hidden.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} with {len(heads)} heads. It must be [experts, tokens, hidden] with one "
            "head per expert."
        )
    for head in heads:
        check_projection(hidden[0], head, targets)
    if any(head.shape != heads[0].shape or head.dtype != heads[0].dtype for head in heads):
        raise ValueError("The heads differ in shape or dtype. Score such experts one at a time.")


def check_projection(hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    """Check one expert's hidden states [tokens, hidden], head [vocab, hidden] and targets [tokens]."""
    if hidden.ndim != 2 or head.ndim != 2 or targets.ndim != 1:
        raise ValueError(
            "hidden, head and targets must be [tokens, hidden], [vocab, hidden] and [tokens] for each expert."
        )
    if hidden.shape[1] != head.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, head {list(head.shape)} and targets {list(targets.shape)}. Hidden sizes "
            "and numbers of tokens must agree."
        )
    if hidden.dtype not in _FLOATS or head.dtype not in _FLOATS:
        raise ValueError(f"hidden is {hidden.dtype} and head {head.dtype}. Use bfloat16, float16 or float32.")
    if not hidden.device == head.device == targets.device:
        raise ValueError(f"hidden is on {hidden.device}. hidden, heads and targets must be on the same device.")


def check_mixture(logits: Tensor, log_weights: Tensor) -> None:
    """Check logits [experts, batch, vocab] with log weights [batch, experts]."""
    if logits.ndim != 3 or log_weights.shape != (logits.shape[1], logits.shape[0]):
        raise ValueError(
            f"logits are {list(logits.shape)} and log_weights {list(log_weights.shape)}. They must be [experts, batch, "
            "vocab] and [batch, experts]."
        )
    if logits.dtype not in _FLOATS or logits.device != log_weights.device:
        raise ValueError(
            f"logits are {logits.dtype} on {logits.device}. They must be bfloat16, float16 or float32, on the device "
            "of log_weights."
        )


def check_sampling(log_weights: Tensor, temperature: float, log_likelihood: Tensor | None) -> None:
    """Check the temperature and the running log-likelihoods [batch, experts]."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature is {temperature}. It must be finite and at least 0, which takes the most likely token."
        )
    if log_likelihood is not None and log_likelihood.shape != log_weights.shape:
        raise ValueError(
            f"log_likelihood is {list(log_likelihood.shape)}. It must be [batch, experts] = {list(log_weights.shape)}."
        )


def refuse_target(target: int, rows: int, ignore_index: int) -> NoReturn:
    """Raise ValueError for a target outside of the vocabulary."""
    raise ValueError(
        f"Target {target} is not in the vocabulary. Use 0 to {rows - 1}, or {ignore_index} for targets to ignore."
    )
