"""Linear layers of Megatron-core whose products run in float8 during training, on GPUs that support it.

Forward products and the gradients of activations are computed from float8 (e4m3) copies with a scale per row, by
PyTorch's `scaled_mm`; the gradients of weights in bfloat16, into the same float32 sums as without float8. Nothing is
kept between steps, so a run resumes with the same bits. In evaluation, products are those of the weights themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, layers
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from btm_scale.errors import LaunchError
from btm_scale.util.imports import run_uncompiled_without_compiler

_DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_DTYPE).max
_SMALLEST_SCALE = 2.0**-100  # of a row of zeros
_TOLERANCE = 0.1  # relative error of a product of normal numbers; that of float8 is 0.03
_PROBE = 256  # rows and columns of that product


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T, bfloat16 [n, m], computed from float8 copies of left [n, width] and right [m, width].

    m and width are multiples of 16. A row or column of the result is NaN if a number it is computed from is NaN or
    infinite. A CPU emulates it: not every version of PyTorch has the operator there.
    """
    (rows, of_rows), (columns, of_columns) = quantized(left), quantized(right)
    return (_emulated if rows.is_cpu else _scaled)(rows, columns.t(), of_rows, of_columns.t())


def _scaled(rows: Tensor, columns: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    recipe = ScalingType.RowWise
    return scaled_mm(rows, columns, of_rows, recipe, of_columns, recipe, output_dtype=torch.bfloat16)


def _emulated(rows: Tensor, columns: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    return (torch.mm(rows.float(), columns.float()) * of_rows * of_columns).bfloat16()


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a contiguous float8 copy of `rows` [n, width], and its scales [n, 1], float32.

    A scale is the smallest power of two, from 2^-100 on, with which all numbers of the row are in float8's range.
    """
    # Detached: torch.compile would compile anew for every shape of a parameter, and where it requires no gradient.
    return (_compiled() if rows.is_cuda else _quantize)(rows.detach())


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / _LARGEST).clamp(min=_SMALLEST_SCALE)
    # Rounded up to a power of two, whose significand is 0. Its inverse has the opposite exponent, so it is exact.
    power = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    inverse = (0x7F000000 - power).view(torch.float32)
    values = (rows.float() * inverse).to(_DTYPE).contiguous()
    return values, torch.where(scale.isfinite(), power.view(torch.float32), torch.nan)


@functools.cache
def _compiled() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return `_quantize`, compiled for all sizes at once."""
    run_uncompiled_without_compiler()
    return torch.compile(_quantize, dynamic=True)


@functools.cache
def require_float8(device: torch.device) -> None:
    """Raise LaunchError if a device does not compute float8 products, or computes wrong ones."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_PROBE, _PROBE, generator=draw).to(device, torch.bfloat16) for _ in range(2))
    for columns in (right, right.t()):  # as forward, and for the gradient of activations
        try:
            result = product(left, columns).double()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise LaunchError(
                f"This device computes no float8 products ({reason}). NVIDIA GPUs do from compute capability 8.9. Set "
                "layout.float8 to false."
            ) from None
        expected = left.double() @ columns.double().t()
        found = float((result - expected).norm() / expected.norm())
        if not found < _TOLERANCE:
            raise LaunchError(
                f"A float8 product of this device has a relative error of {found:.2g}, and should have about 0.03. Set "
                "layout.float8 to false, and report the device and the version of torch."
            )


class Float8Product(torch.autograd.Function):
    """states [..., width], weight [outputs, width] -> states weight^T, [..., outputs].

    Every rank of `group` has other rows of the weight, and the gradient of the states is summed over the ranks. With
    `shards_sequence`, each has a part of the first dimension of the states: these are gathered here, and again in the
    backward pass. With `sums`, float32 like the weight, the weight's gradient is added to them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        sums: Tensor | None,
        group: dist.ProcessGroup | None,
        shards_sequence: bool,
    ) -> Tensor:
        """Return [..., outputs], of the complete sequence."""
        ctx.save_for_backward(states if ctx.needs_input_grad[1] else None, weight)
        ctx.sums, ctx.group, ctx.shards_sequence = sums, group, shards_sequence
        return _product(_complete(states, group, shards_sequence), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states and weight, the latter unless it is summed."""
        states, weight = ctx.saved_tensors
        (gradient,) = gradients
        for_states = for_weight = reduction = None
        if ctx.needs_input_grad[0]:
            for_states = _product(gradient, weight.t())
            if ctx.shards_sequence:
                for_states = reduce_scatter_to_sequence_parallel_region(for_states, group=ctx.group)
            elif ctx.group is not None:
                reduction = dist.all_reduce(for_states, group=ctx.group, async_op=True)  # beside the weight's gradient
        if ctx.needs_input_grad[1]:
            rows = _complete(states, ctx.group, ctx.shards_sequence).flatten(0, -2)
            if ctx.sums is not None:
                layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(rows, gradient.flatten(0, -2), ctx.sums)
            else:
                for_weight = torch.mm(gradient.flatten(0, -2).t(), rows)
        if reduction is not None:
            reduction.wait()
        return for_states, for_weight, None, None, None


def _complete(states: Tensor, group: dist.ProcessGroup | None, shards_sequence: bool) -> Tensor:
    complete: Tensor = gather_from_sequence_parallel_region(states, group=group) if shards_sequence else states
    return complete


def _product(states: Tensor, weight: Tensor) -> Tensor:
    return product(states.flatten(0, -2), weight).view(*states.shape[:-1], -1)


class _Float8:
    """A linear layer of Megatron-core that trains in float8."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Any,
        *,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **rest: Any,
    ) -> Tensor:
        if not self.training:  # type: ignore[attr-defined]
            return super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                bias=bias,
                gradient_accumulation_fusion=gradient_accumulation_fusion,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **rest,
            )
        sums = weight.main_grad if gradient_accumulation_fusion else None
        group = tp_group if allreduce_dgrad or sequence_parallel else None
        result: Tensor = Float8Product.apply(input, weight, sums, group, sequence_parallel)
        return result if bias is None else result + bias


class Float8Column(_Float8, ColumnParallelLinear):
    """A column-parallel linear layer that trains in float8."""


class Float8Row(_Float8, RowParallelLinear):
    """A row-parallel linear layer that trains in float8."""
