"""Launch the Triton kernels of the loss, on the current device and its current stream."""

from __future__ import annotations

import torch
from torch import Tensor

from btm_scale.kernels.loss import cross_entropy_kernel, logit_gradient_kernel, logit_partials_kernel
from btm_scale.kernels.loss_resident import resident_cross_entropy_kernel
from btm_scale.kernels.loss_tuning import LossConfig
from btm_scale.kernels.partials import Partials
from btm_scale.kernels.pieces import real_columns


def cross_entropy_(logits: Tensor, targets: Tensor, *, vocab_size: int | None, config: LossConfig) -> Tensor:
    """See `btm_scale.kernels.cross_entropy_`. The last stride of `logits` must be 1."""
    tokens, width = logits.shape
    losses = torch.empty(tokens, device=logits.device)
    arguments = logits, targets, losses, real_columns(width, 0, vocab_size), width, logits.stride(0)
    if config.kept:
        resident_cross_entropy_kernel[(tokens,)](
            *arguments, 0, BLOCK=config.block, KEPT=config.kept, num_warps=config.warps
        )
    else:
        cross_entropy_kernel[(tokens,)](*arguments, BLOCK=config.block, num_warps=config.warps)
    return losses


def logit_partials(
    logits: Tensor, targets: Tensor, *, vocab_start: int, vocab_size: int | None, config: LossConfig
) -> Partials:
    """See `btm_scale.kernels.logit_partials`. The last stride of `logits` must be 1."""
    tokens, width = logits.shape
    maximum, sum_exp, target_logit = (torch.empty(tokens, device=logits.device) for _ in range(3))
    logit_partials_kernel[(tokens,)](
        logits,
        targets,
        maximum,
        sum_exp,
        target_logit,
        real_columns(width, vocab_start, vocab_size),
        width,
        vocab_start,
        logits.stride(0),
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return maximum, sum_exp, target_logit


def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    *,
    vocab_start: int,
    vocab_size: int | None,
    config: LossConfig,
) -> None:
    """See `btm_scale.kernels.logit_gradient_`. The last stride of `logits` must be 1."""
    tokens, width = logits.shape
    logit_gradient_kernel[(tokens,)](
        logits,
        targets,
        maximum,
        sum_exp,
        real_columns(width, vocab_start, vocab_size),
        width,
        vocab_start,
        logits.stride(0),
        BLOCK=config.block,
        num_warps=config.warps,
    )
