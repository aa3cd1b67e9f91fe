"""PyTorch reference of the loss's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from btm_scale.kernels.partials import Partials
from btm_scale.kernels.pieces import real_columns

_INF = float("inf")


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """See `btm_scale.kernels.cross_entropy_`."""
    values = _without_padding(logits, 0, vocab_size)
    values.sub_(values.amax(dim=1, keepdim=True))
    target = targets[:, None]
    at_target = values.gather(1, target)
    total = values.exp_().sum(dim=1, keepdim=True)
    values.div_(total).scatter_add_(1, target, values.new_full((), -1.0).expand_as(target))
    _store(values, logits)
    return (total.log_() - at_target)[:, 0]


@torch.no_grad()
def logit_partials(logits: Tensor, targets: Tensor, *, vocab_start: int = 0, vocab_size: int | None = None) -> Partials:
    """See `btm_scale.kernels.logit_partials`."""
    columns = real_columns(logits.shape[1], vocab_start, vocab_size)
    if columns == 0:
        nothing = torch.full(targets.shape, -_INF, device=logits.device)
        return nothing, torch.zeros_like(nothing), nothing.clone()
    values = logits[:, :columns].float()
    local, here = _local(targets, vocab_start, columns)
    target_logit = values.gather(1, local)[:, 0].masked_fill_(~here, -_INF)
    maximum = values.amax(dim=1)
    shift = maximum.masked_fill(maximum == -_INF, 0.0)  # (-inf) - (-inf) would be NaN
    return maximum, (values - shift[:, None]).exp_().sum(dim=1), target_logit


@torch.no_grad()
def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> None:
    """See `btm_scale.kernels.logit_gradient_`."""
    values = _without_padding(logits, vocab_start, vocab_size)
    local, here = _local(targets, vocab_start, real_columns(logits.shape[1], vocab_start, vocab_size))
    values.sub_(maximum[:, None]).exp_().div_(sum_exp[:, None]).scatter_add_(1, local, -here.float()[:, None])
    _store(values, logits)


def _without_padding(logits: Tensor, vocab_start: int, vocab_size: int | None) -> Tensor:
    """Return float32 logits with -inf as padding. Float32 logits are changed in place, others are copied."""
    values = logits.float()
    columns = real_columns(logits.shape[1], vocab_start, vocab_size)
    if columns < logits.shape[1]:
        values[:, columns:] = -_INF
    return values


def _local(targets: Tensor, vocab_start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the targets' columns [tokens, 1], 0 for those of other shards, and whether this shard has them."""
    local = targets - vocab_start
    here = (local >= 0) & (local < columns)
    return local.masked_fill_(~here, 0)[:, None], here


def _store(values: Tensor, logits: Tensor) -> None:
    if values is not logits:
        logits.copy_(values)
