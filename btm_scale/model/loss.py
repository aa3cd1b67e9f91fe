"""Fused LM head and cross entropy: logits are materialized for one chunk of tokens at a time.

The forward pass turns each chunk's logits into their gradient in place, and saves the gradients of hidden states and
weight, so a step never holds a tensor [tokens, vocabulary] and computes nothing twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from btm_scale.kernels import add_product_, cross_entropy_, logit_gradient_, logit_partials
from btm_scale.kernels.partials import Partials, finish, merge
from btm_scale.model.loss_chunks import row_elements, tokens_per_chunk


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
        needs_grad: bool,
    ) -> Tensor:
        tokens, rows = len(targets), len(weight)
        on_cpu = hidden.device.type == "cpu"
        size = max(1, tokens_per_chunk(tokens, rows, weight.element_size(), on_cpu=on_cpu))
        losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden if needs_grad else hidden[:0])
        trains_weight = needs_grad and weight.requires_grad
        # The gradient of a single chunk is not summed, so it is computed in the weight's dtype.
        sums = weight if trains_weight else weight[:0]
        grad_weight = torch.empty_like(sums, dtype=weight.dtype if tokens <= size else torch.float32)
        buffer = weight.new_empty(min(size, tokens), rows if on_cpu else row_elements(rows))
        columns = {"vocab_start": first_token, "vocab_size": min(vocabulary, first_token + rows)}
        for start in range(0, tokens, size):
            states, labels = hidden[start : start + size], targets[start : start + size]
            padded = buffer[: len(states)]
            logits = torch.mm(states, weight.t(), out=padded[:, :rows])
            losses[start : start + size] = _chunk_losses(padded, labels, columns, group, needs_grad)
            if needs_grad:
                gradient = logits
                torch.mm(gradient, weight, out=grad_hidden[start : start + size])
            if trains_weight:
                add_product_(grad_weight, gradient, states, overwrite=start == 0)
        if tokens == 0:
            grad_weight.zero_()  # no chunk has written it
        if needs_grad:
            if group is not None:
                dist.all_reduce(grad_hidden, dist.ReduceOp.SUM, group)
            ctx.save_for_backward(grad_hidden, grad_weight if trains_weight else None)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0] / max(1, len(grad_hidden))
        scaled = None
        if grad_weight is not None:
            # Float32 sums are scaled before they are rounded.
            scaled = torch.mul(grad_weight, scale, out=torch.empty_like(grad_weight, dtype=grad_hidden.dtype))
        return grad_hidden * scale.to(grad_hidden.dtype), scaled, None, None, None, None, None


def _chunk_losses(
    logits: Tensor, targets: Tensor, columns: dict[str, int], group: dist.ProcessGroup | None, needs_grad: bool
) -> Tensor:
    """Return the losses [tokens] of a chunk; with `needs_grad`, its logits become their gradient.

    `columns` holds the `vocab_start` and `vocab_size` of this shard; its columns from `vocab_size` on are padding.
    """
    if group is None and needs_grad:
        return cross_entropy_(logits, targets, vocab_size=columns["vocab_size"])
    partials = logit_partials(logits, targets, **columns)
    if group is not None:
        partials = _merged(partials, group)
    if needs_grad:
        maximum, sum_exp, _ = partials
        logit_gradient_(logits, targets, maximum, sum_exp, **columns)
    return -finish(*partials)


def _merged(partials: Partials, group: dist.ProcessGroup) -> Partials:
    """Return the partials of all shards of the vocabulary, merged in the same order on every rank."""
    own = torch.cat(partials)
    flat = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(flat, own, group=group)
    shards = flat.view(-1, 3, len(partials[0]))
    total = shards[0, 0], shards[0, 1], shards[0, 2]
    for shard in shards[1:]:
        total = merge(total, (shard[0], shard[1], shard[2]))
    return total


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
    Without tokens the mean is NaN and the gradients are 0, like those of PyTorch's cross entropy.
    """
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _HeadLoss.apply(hidden, weight, targets, first_token, vocabulary, group, needs_grad)
