"""Triton kernels: a residual connection and the norm after it, forward and backward.

A complete row, which is one token, is held in registers, so every tensor is read once. Results are deterministic.
"""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(
    added_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    shift_ptr,
    total_ptr,
    normed_ptr,
    mean_ptr,
    scale_ptr,
    hidden,
    epsilon,
    BLOCK: tl.constexpr,
):
    """total = added + bias + residual; x = total - mean; scale = 1 / sqrt(mean x^2 + epsilon); x scale weight + shift.

    One row [hidden]. Pointers of tensors that do not exist are None: without `shift_ptr` the mean counts as 0.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * hidden
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden
    values = tl.load(added_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        values += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        values += tl.load(residual_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    if total_ptr is not None:
        # The norm is that of the total as it is stored, which the backward pass reads.
        total = values.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + start + columns, total, mask=mask)
        values = total.to(tl.float32)
    if shift_ptr is not None:
        mean = tl.sum(values, 0) / hidden
        tl.store(mean_ptr + row, mean)
        values = tl.where(mask, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / hidden + epsilon)
    tl.store(scale_ptr + row, scale)
    normed = values * scale * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        normed += tl.load(shift_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + start + columns, normed.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_backward_kernel(
    gradient_ptr,
    upstream_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    scale_ptr,
    result_ptr,
    sums_ptr,
    rows,
    hidden,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With u = upstream weight and x = (total - mean) scale: gradient + scale (u - x mean(u x) - mean(u)).

    mean(u) is left out without `mean_ptr`, the gradient of the total without `gradient_ptr`. Program p of n computes
    rows p, p + n, p + 2n, ... of [rows, hidden], and writes its sums over them to sums [kinds, programs, hidden]: of
    upstream x, which is the weight's gradient, of upstream with `mean_ptr`, and of the result with HAS_BIAS.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    for_weight = tl.zeros((BLOCK,), tl.float32)
    for_shift = tl.zeros((BLOCK,), tl.float32)
    for_bias = tl.zeros((BLOCK,), tl.float32)
    start = program.to(tl.int64) * hidden
    step = programs.to(tl.int64) * hidden
    for row in range(program, rows, programs):
        scale = tl.load(scale_ptr + row)
        values = tl.load(total_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(upstream_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        if mean_ptr is not None:
            values = tl.where(mask, values - tl.load(mean_ptr + row), 0.0)
        unit = values * scale
        weighted = upstream * weight
        inner = weighted - unit * (tl.sum(weighted * unit, 0) / hidden)
        if mean_ptr is not None:
            inner -= tl.sum(weighted, 0) / hidden
            for_shift += upstream
        for_weight += upstream * unit
        inner *= scale
        if gradient_ptr is not None:
            inner += tl.load(gradient_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        result = inner.to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + start + columns, result, mask=mask)
        if HAS_BIAS:
            for_bias += result.to(tl.float32)
        start += step
    sums_ptr += program * hidden + columns
    kind = programs * hidden
    tl.store(sums_ptr, for_weight, mask=mask)
    if mean_ptr is not None:
        sums_ptr += kind
        tl.store(sums_ptr, for_shift, mask=mask)
    if HAS_BIAS:
        sums_ptr += kind
        tl.store(sums_ptr, for_bias, mask=mask)


@triton.jit
def column_sums_kernel(sums_ptr, out_ptr, programs, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[kind, column] = sum of sums[kind, :, column], of COLUMNS columns of [kinds, programs, hidden]."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    kind = tl.program_id(1)
    mask = columns < hidden
    sums_ptr += kind * programs * hidden
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < programs)[:, None] & mask[None, :]
        total += tl.load(sums_ptr + rows[:, None] * hidden + columns[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + kind * hidden + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=mask)
