"""Triton kernel: cross entropy over rows of 16-bit logits that stay in registers between the two passes.

Each logit is read once from memory, and its gradient is written once.
"""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from btm_scale.kernels.scoring import FLOOR

_LOG2_E = tl.constexpr(1.4426950408889634)
_PAIRS = tl.constexpr(4)  # of a thread, in one 16-byte load
# Two logits of -inf.
_NOTHING_BFLOAT16 = tl.constexpr(0xFF80FF80 - (1 << 32))
_NOTHING_FLOAT16 = tl.constexpr(0xFC00FC00 - (1 << 32))


@triton.jit
def _floats(pairs, dtype: tl.constexpr):
    """Return the logits of even and of odd columns in float32."""
    if dtype == tl.bfloat16:
        return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        even, odd = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
        return even.to(dtype, bitcast=True).to(tl.float32), odd.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _load_row(pairs_ptr, columns, width, NOTHING: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr):
    """Return the KEPT blocks of a row as pairs of logits; columns from `columns` on, all in the last, are -inf."""
    threads = tl.arange(0, BLOCK // (2 * _PAIRS))
    here = (threads * _PAIRS)[:, None] + tl.arange(0, _PAIRS)[None, :]
    blocks = ()
    for block in tl.static_range(KEPT - 1):
        blocks = blocks + (tl.load(pairs_ptr + block * (BLOCK // 2) + here),)  # noqa: RUF005 - Triton's tuples
    here += (KEPT - 1) * (BLOCK // 2)
    last = tl.load(pairs_ptr + here, mask=here < width // 2, other=NOTHING)
    last = tl.where(2 * here + 1 < columns, last, (last & 0xFFFF) | (NOTHING & -65536))
    last = tl.where(2 * here < columns, last, NOTHING)
    return blocks + (last,)  # noqa: RUF005


@triton.jit(do_not_specialize=["zero"])
def resident_cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    columns,
    width,
    row_stride,
    zero,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
):
    """loss = log sum exp l - l[target], and in place l <- softmax(l) - [v = target], of one row [width].

    `width` is even, and KEPT blocks hold the row. The real columns end in the last block.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    nothing: tl.constexpr = _NOTHING_BFLOAT16 if dtype == tl.bfloat16 else _NOTHING_FLOAT16
    threads: tl.constexpr = BLOCK // (2 * _PAIRS)
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    target = tl.where((target >= 0) & (target < columns), target, -1)
    target_logit = tl.load(logits_ptr + target, mask=target >= 0, other=-float("inf")).to(tl.float32)
    blocks = _load_row(logits_ptr.to(tl.pointer_type(tl.int32)), columns, width, nothing, BLOCK, KEPT)

    # m = max l and sum exp(l - m) of each thread, while later blocks still arrive.
    maximum = tl.full((threads,), FLOOR, tl.float32)
    sum_exp = tl.zeros((threads,), tl.float32)
    for block in tl.static_range(KEPT):
        even, odd = _floats(blocks[block], dtype)
        higher = tl.maximum(maximum, tl.max(tl.maximum(even, odd), 1))
        pairs = tl.exp2((even - higher[:, None]) * _LOG2_E) + tl.exp2((odd - higher[:, None]) * _LOG2_E)
        sum_exp = sum_exp * tl.exp2((maximum - higher) * _LOG2_E) + tl.sum(pairs, 1)
        maximum = higher
    top = tl.max(maximum, 0)
    total = tl.sum(sum_exp * tl.exp2((maximum - top) * _LOG2_E), 0)
    total = tl.where(top == float("inf"), float("nan"), total)  # otherwise only the infinite logit would be NaN
    tl.store(loss_ptr + row, tl.log(total) - (target_logit - top))

    scale = 1.0 / total
    offsets = (tl.arange(0, threads) * (2 * _PAIRS))[:, None] + tl.arange(0, 2 * _PAIRS)[None, :]
    for block in tl.static_range(KEPT):
        # `zero` is 0, unknown to the compiler, which would keep the first pass's floats in twice the registers.
        even, odd = _floats(blocks[block] ^ zero, dtype)
        even = tl.exp2((even - top) * _LOG2_E) * scale
        odd = tl.exp2((odd - top) * _LOG2_E) * scale
        gradient = tl.reshape(tl.join(even, odd), (threads, 2 * _PAIRS))
        gradient = tl.where(target - offsets == block * BLOCK, gradient - 1.0, gradient).to(dtype)
        if block < KEPT - 1:
            tl.store(logits_ptr + block * BLOCK + offsets, gradient)
        else:
            tl.store(logits_ptr + block * BLOCK + offsets, gradient, mask=block * BLOCK + offsets < width)
