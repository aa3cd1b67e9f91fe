"""A layer's elementwise kernels as autograd functions, for GPUs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions import fused_bias_gelu
from megatron.core.tensor_parallel import layers
from torch import Tensor

from btm_scale.kernels import add_norm, add_norm_backward, bias_gelu_backward, join_rotated, split_rotated


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
        return join_rotated(*gradients, *ctx.saved_tensors)[0], None, None


class SplitBiased(torch.autograd.Function):
    """`mixed` [length, batch, KV heads, heads per KV head + 2, d], bias -> queries, keys and values, which are views.

    The bias is in `mixed` already. Its gradient, the sum of that of `mixed`, is computed where that is written.
    """

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [length, batch, heads or KV heads, d]. Queries are copied where several share a KV head."""
        query = mixed[:, :, :, :-2].reshape(*mixed.shape[:2], -1, mixed.shape[4])
        return query, mixed[:, :, :, -2], mixed[:, :, :, -1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `kernels.join_rotated`."""
        mixed, bias = join_rotated(*gradients, has_bias=ctx.needs_input_grad[1])
        return mixed, bias if ctx.needs_input_grad[1] else None


class BiasedProduct(torch.autograd.Function):
    """states [..., hidden], weight [width, hidden], bias [width], sums -> states weight^T + bias, [..., width].

    The bias is added in the matrix product. Its gradient is not computed here. With `sums`, float32 like the weight,
    the weight's gradient is added to them, as by Megatron-core's linear layers.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor, sums: Tensor | None) -> Tensor:
        """Return [..., width]."""
        ctx.save_for_backward(states, weight)
        ctx.sums = sums  # changed in place before the backward pass of every micro-batch but the first
        product = torch.addmm(bias, states.flatten(0, -2), weight.t())
        return product.view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of states and weight, the latter unless it is summed."""
        states, weight = ctx.saved_tensors
        gradient, rows = gradients[0].flatten(0, -2), states.flatten(0, -2)
        for_states = torch.mm(gradient, weight).view_as(states) if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.sums is not None:
            layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(rows, gradient, ctx.sums)
        elif ctx.needs_input_grad[1]:
            for_weight = torch.mm(gradient.t(), rows)
        return for_states, for_weight, None, None


class BiasGelu(torch.autograd.Function):
    """values [..., width], bias [width] -> gelu(values + bias), approximated by tanh."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, bias: Tensor) -> Tensor:
        """Return [..., width], by the function that Megatron-core compiles."""
        ctx.save_for_backward(values, bias)
        activated: Tensor = fused_bias_gelu.bias_gelu(bias, values)
        return activated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """See `kernels.bias_gelu_backward`."""
        return bias_gelu_backward(*gradients, *ctx.saved_tensors)


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
