"""Triton kernels: cross entropy over a chunk of logits, which become the loss's gradient in place.

One program has one row, so no result depends on scheduling. A row's second pass reads what the first left in the cache,
as far as the rows in flight fit there; loss_resident.py keeps shorter rows in registers instead.
"""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from btm_scale.kernels.scoring import FLOOR


@triton.jit
def _load(row_ptr, offsets, columns, width):
    """Return logits, -inf for padding. Loads are masked by `width` alone: a multiple of 16 keeps them wide."""
    logits = tl.load(row_ptr + offsets, mask=offsets < width, other=-float("inf")).to(tl.float32)
    return tl.where(offsets < columns, logits, -float("inf"))


@triton.jit
def _row_partials(row_ptr, columns, width, target, BLOCK: tl.constexpr):
    """Return m = max l, sum exp(l - m) and l[target] (-inf without a target) of the first `columns` of a row."""
    maximum = tl.full((BLOCK,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    at_target = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        logits = _load(row_ptr, offsets, columns, width)
        at_target = tl.where(offsets == target, logits, at_target)
        difference = logits - maximum
        decay = tl.exp(-tl.abs(difference))
        sum_exp = tl.where(difference > 0, sum_exp * decay + 1.0, sum_exp + decay)
        maximum = tl.maximum(maximum, logits)
    top = tl.max(maximum, 0)
    total = tl.sum(sum_exp * tl.exp(maximum - top), 0)
    total = tl.where(top == float("inf"), float("nan"), total)  # otherwise only the infinite logit would be NaN
    return top, total, tl.max(at_target, 0)


@triton.jit
def _write_gradient(row_ptr, columns, width, target, maximum, total, BLOCK: tl.constexpr):
    """Replace l by exp(l - m) / sum - [v = target]; columns from `columns` to `width` are padding and become 0."""
    scale = 1.0 / total
    for start in range(0, width, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        logits = _load(row_ptr, offsets, columns, width)
        gradient = tl.exp(logits - maximum) * scale - tl.where(offsets == target, 1.0, 0.0)
        tl.store(row_ptr + offsets, gradient.to(row_ptr.dtype.element_ty), mask=offsets < width)


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, loss_ptr, columns, width, row_stride, BLOCK: tl.constexpr):
    """loss = log sum exp l - l[target], and in place l <- softmax(l) - [v = target], of one row [width]."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    maximum, total, at_target = _row_partials(logits_ptr, columns, width, target, BLOCK)
    tl.store(loss_ptr + row, tl.log(total) - (at_target - maximum))
    _write_gradient(logits_ptr, columns, width, target, maximum, total, BLOCK)


@triton.jit
def logit_partials_kernel(
    logits_ptr,
    targets_ptr,
    maximum_ptr,
    sum_exp_ptr,
    target_logit_ptr,
    columns,
    width,
    first_token,
    row_stride,
    BLOCK: tl.constexpr,
):
    """m = max l, sum exp(l - m) and l[target] of one row of a shard of the vocabulary."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row) - first_token
    target = tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)
    maximum, total, at_target = _row_partials(logits_ptr, columns, width, target, BLOCK)
    tl.store(maximum_ptr + row, tl.where(total == 0, -float("inf"), maximum))
    tl.store(sum_exp_ptr + row, total)
    tl.store(target_logit_ptr + row, at_target)


@triton.jit
def logit_gradient_kernel(
    logits_ptr,
    targets_ptr,
    maximum_ptr,
    sum_exp_ptr,
    columns,
    width,
    first_token,
    row_stride,
    BLOCK: tl.constexpr,
):
    """In place l <- exp(l - m) / sum - [v = target], with m and sum of all shards, of one row of a shard."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row) - first_token
    target = tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32)
    maximum, total = tl.load(maximum_ptr + row), tl.load(sum_exp_ptr + row)
    _write_gradient(logits_ptr, columns, width, target, maximum, total, BLOCK)
