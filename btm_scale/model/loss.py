"""Fused LM head and cross entropy: logits are materialized for one chunk of tokens at a time.

The forward pass saves the gradients of hidden states and weight instead of logits, so a step never holds a tensor
[tokens, vocabulary] and computes nothing twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Elements in one chunk of logits: 8 MiB of float32 fit a core's cache and fill a GPU's multiprocessors.
_CHUNK_ELEMENTS = 2 << 20


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        first_token: int,
        vocabulary: int,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        tokens, rows = len(targets), len(weight)
        needs_grad = hidden.requires_grad or weight.requires_grad
        chunk = max(16, _CHUNK_ELEMENTS // rows)
        losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None
        if weight.requires_grad:
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        padding = first_token + rows - vocabulary
        for start in range(0, tokens, chunk):
            span = slice(start, start + chunk)
            local = targets[span] - first_token
            absent = (local < 0) | (local >= rows)
            local = local.masked_fill(absent, 0)[:, None]
            logits = torch.mm(hidden[span], weight.t()).float()
            if padding > 0:
                logits[:, rows - padding :] = -torch.inf
            peak = logits.amax(dim=1, keepdim=True)
            if group is not None:
                dist.all_reduce(peak, dist.ReduceOp.MAX, group)
            logits -= peak
            at_target = logits.gather(1, local).masked_fill_(absent[:, None], 0.0)
            probabilities = logits.exp_()
            total = probabilities.sum(dim=1, keepdim=True)
            if group is not None:
                both = torch.cat([total, at_target], dim=1)
                dist.all_reduce(both, dist.ReduceOp.SUM, group)
                total, at_target = both[:, :1], both[:, 1:]
            losses[span] = (total.log() - at_target)[:, 0]
            if grad_hidden is not None:
                probabilities /= total
                probabilities.scatter_add_(1, local, absent[:, None].float() - 1.0)
                gradient = probabilities.to(weight.dtype)
                torch.mm(gradient, weight, out=grad_hidden[span])
                if grad_weight is not None:
                    grad_weight += torch.mm(gradient.t(), hidden[span])
        if grad_hidden is not None:
            if group is not None:
                dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, group)
            ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = (grad_outputs[0] / len(grad_hidden)).to(grad_hidden.dtype)
        return grad_hidden * scale, None if grad_weight is None else grad_weight * scale, None, None, None, None


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_token: int = 0,
    vocabulary: int,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the mean cross entropy in nats over `targets` [tokens], float32.

    `hidden` is [tokens, hidden]; `weight` [rows, hidden] is this rank's part of the LM head, beginning with the row of
    `first_token`. Rows of tokens from `vocabulary` on are padding. All tensor parallel ranks of `group` get the same
    loss and the same gradient of `hidden`. Logits are rounded to the weight's dtype, like the output of a linear head.
    """
    return _HeadLoss.apply(hidden, weight, targets, first_token, vocabulary, group)
