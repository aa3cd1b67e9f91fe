"""Shared by Triton and the reference: combine partial results to log-probabilities, normalize weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, cast

import torch
from torch import Tensor

Partials = tuple[Tensor, Tensor, Tensor]
NO_TOKEN = -1


def finish(maximum: Tensor, sum_exp: Tensor, target_logit: Tensor) -> Tensor:
    """Return the log-probabilities of the targets in nats: (target - maximum) - log(sum), never above 0.

    A target logit of +inf marks an ignored token and gives 0; -inf stays -inf, and NaN stays NaN.
    """
    shift = maximum.masked_fill(maximum == -float("inf"), 0.0)
    log_probs = (target_logit - shift) - sum_exp.log()
    impossible = (target_logit == -float("inf")) & ~sum_exp.isnan()
    ignored = (target_logit == float("inf")) & (maximum < float("inf"))
    return log_probs.masked_fill(impossible, -float("inf")).masked_fill(ignored, 0.0).clamp_(max=0.0)


def merge(parts: Partials, more: Partials) -> Partials:
    """Combine the partials of two disjoint sets of vocabulary rows."""
    maximum = torch.maximum(parts[0], more[0])
    shift = maximum.masked_fill(maximum == -float("inf"), 0.0)
    sum_exp = parts[1] * (parts[0] - shift).exp() + more[1] * (more[0] - shift).exp()
    return maximum, sum_exp, torch.maximum(parts[2], more[2])


def combine_partials(partials: Sequence[Partials] | Partials) -> Tensor:
    """Return the log-probabilities in nats, given the partials of every vocabulary shard.

    Args:
        partials: one (maximum, sum_exp, target_logit) per shard in shard order, each [tokens]; or one such triple of
            stacked tensors [shards, tokens].

    Returns:
        float32 [tokens], never above 0, and 0 for ignored tokens. Shards are added in order, so every rank gets the
        same bits. A target that is in no shard has log-probability -inf.

    Raises:
        ValueError: `partials` is empty, or its shards are on different devices.
        FloatingPointError: a log-probability is NaN.
    """
    shards = cast(
        Sequence[Partials],
        list(zip(*partials, strict=True)) if len(partials) and isinstance(partials[0], Tensor) else partials,
    )
    if len({part.device for shard in shards for part in shard}) > 1:
        raise ValueError("The partials are on different devices. Move all of them to the same device.")
    if len(shards) == 0:
        raise ValueError("There are no partials to combine. Pass one triple for each shard of the vocabulary.")
    total = shards[0]
    for shard in shards[1:]:
        total = merge(total, shard)
    log_probs = finish(*total)
    if log_probs.isnan().any():
        refuse_nan(log_probs)
    return log_probs


def refuse_nan(log_probs: Tensor) -> NoReturn:
    """Raise FloatingPointError with the index of the first NaN."""
    where = log_probs.isnan().nonzero()[0].tolist()
    raise FloatingPointError(
        f"The log-probability at index {where} is NaN. Its hidden states or head contain NaN or infinity: check for a "
        "diverged or damaged expert."
    )


def normalized(log_weights: Tensor) -> Tensor:
    """Return float32 log weights [batch, experts] normalized per row; a row of zero weights stays all -inf."""
    log_weights = log_weights.double()
    total = log_weights.logsumexp(1, keepdim=True)
    return (log_weights - total.masked_fill(total == -float("inf"), 0.0)).float()
