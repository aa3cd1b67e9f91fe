"""A layer's elementwise kernels as autograd functions, for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from btm_scale.kernels import add_norm, add_norm_backward, join_rotated, split_rotated


class SplitRotated(torch.autograd.Function):
    """`mixed`, cos, sin -> rotated queries and keys of `kernels.split_rotated`, and values, which are a view."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `kernels.split_rotated`."""
        ctx.save_for_backward(cos, sin)
        query, key = split_rotated(mixed, cos, sin)
        return query, key, mixed[:, :, :, -1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """See `kernels.join_rotated`."""
        query, key, value = gradients
        return join_rotated(query, key, value, *ctx.saved_tensors), None, None


class AddNorm(torch.autograd.Function):
    """added, bias, residual, weight, shift, epsilon -> total and its norm, by `kernels.add_norm`.

    The total is also the next residual connection's input; that gradient is added in the norm's backward kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        added: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        shift: Tensor | None,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        """See `kernels.add_norm`."""
        total, normed, mean, scale = add_norm(added, weight, bias=bias, residual=residual, shift=shift, epsilon=epsilon)
        if total is added:
            total = added.view_as(added)  # an output of a Function must not be one of its inputs
        ctx.save_for_backward(total, weight, mean, scale)
        ctx.given = bias is not None, residual is not None, shift is not None
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """See `kernels.add_norm_backward`."""
        total, weight, mean, scale = ctx.saved_tensors
        has_bias, has_residual, has_shift = ctx.given
        gradient, upstream = gradients
        assert upstream is not None  # a layer always uses the norm
        result, vectors = add_norm_backward(
            upstream, total, weight, mean, scale, gradient=gradient, has_shift=has_shift, has_bias=has_bias
        )
        return (
            result,
            vectors[-1] if has_bias else None,
            result if has_residual else None,
            vectors[0],
            vectors[1] if has_shift else None,
            None,
        )
