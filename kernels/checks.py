"""What the public functions refuse. All raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_heads(hidden: Tensor, heads: Sequence[Tensor], targets: Tensor) -> None:
    """Hidden states [experts, tokens, hidden] with one head for each expert."""
    if hidden.ndim != 3 or len(heads) != hidden.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} with {len(heads)} heads; "
            "it must be [experts, tokens, hidden] with one head for each expert."
        )
    for head in heads:
        check_projection(hidden[0], head, targets)
    if any(head.shape != heads[0].shape or head.dtype != heads[0].dtype for head in heads):
        raise ValueError("the heads differ in shape or type; score experts of different sizes one at a time.")


def check_projection(hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    """One expert's hidden states [tokens, hidden], head [vocab, hidden] and targets [tokens]."""
    if hidden.ndim != 2 or head.ndim != 2 or targets.ndim != 1:
        raise ValueError("hidden and heads must be matrices for each expert, and targets a vector.")
    if hidden.shape[1] != head.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"{hidden.shape[0]} tokens of size {hidden.shape[1]}, a head of size {head.shape[1]} and "
            f"{targets.shape[0]} targets do not fit: sizes and numbers of tokens must agree."
        )
    if hidden.dtype not in _FLOATS or head.dtype not in _FLOATS:
        raise ValueError(f"hidden is {hidden.dtype} and head {head.dtype}; use bfloat16, float16 or float32.")
    if not hidden.device == head.device == targets.device:
        raise ValueError(f"hidden, heads and targets must be on one device; hidden is on {hidden.device}.")


def check_mixture(logits: Tensor, log_weights: Tensor) -> None:
    """Logits [experts, batch, vocab] with log weights [batch, experts]."""
    if logits.ndim != 3 or log_weights.shape != (logits.shape[1], logits.shape[0]):
        raise ValueError(
            f"logits are {list(logits.shape)} and log_weights {list(log_weights.shape)}; "
            "they must be [experts, batch, vocab] and [batch, experts]."
        )
    if logits.dtype not in _FLOATS or logits.device != log_weights.device:
        raise ValueError("logits must be bfloat16, float16 or float32, on the device of log_weights.")


def check_sampling(log_weights: Tensor, temperature: float, log_likelihood: Tensor | None) -> None:
    """How tokens are drawn, and the running log-likelihoods that a draw is added to."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} is not a number of at least 0; 0 takes the likeliest token.")
    if log_likelihood is not None and log_likelihood.shape != log_weights.shape:
        raise ValueError(
            f"log_likelihood is {list(log_likelihood.shape)}; it must be [batch, experts] = {list(log_weights.shape)}."
        )


def refuse_target(target: int, rows: int, ignore_index: int) -> NoReturn:
    """A target outside the vocabulary; looked for after the launch, so that it costs no synchronisation before."""
    raise ValueError(
        f"target {target} is not in the vocabulary; targets are 0 to {rows - 1}, or {ignore_index} to be ignored."
    )
