"""Triton kernel: the gradient of a bias and GELU. Results are deterministic."""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def bias_gelu_backward_kernel(
    upstream_ptr, values_ptr, bias_ptr, result_ptr, sums_ptr, rows, width, BLOCK: tl.constexpr
):
    """result = upstream gelu'(values + bias), gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.

    BLOCK columns of [rows, width]. Program p of n computes rows p, p + n, p + 2n, ..., and writes its sums over the
    result to sums [programs, width].
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    start = program.to(tl.int64) * width
    step = programs.to(tl.int64) * width
    for _ in range(program, rows, programs):
        at = start + columns
        x = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias
        square = x * x
        # (1 + tanh(z)) / 2 = sigmoid(2 z)
        sigmoid = tl.sigmoid(x * _TWICE_ROOT * (square * _CUBIC + 1))
        slope = sigmoid + x * _TWICE_ROOT * sigmoid * (1 - sigmoid) * (square * _CUBIC * 3 + 1)
        upstream = tl.load(upstream_ptr + at, mask=mask, other=0.0).to(tl.float32)
        result = (upstream * slope).to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + at, result, mask=mask)
        sums += result.to(tl.float32)
        start += step
    tl.store(sums_ptr + program * width + columns, sums, mask=mask)
