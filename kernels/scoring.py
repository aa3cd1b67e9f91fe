"""Triton kernels: log-probability partials of many experts' tokens from hidden states, with no logits in memory."""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# The lowest finite float32, so that the difference of two maxima is never (-inf) - (-inf).
FLOOR = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def score_kernel(
    hidden_ptr,
    heads_ptr,
    targets_ptr,
    maximum_ptr,
    sum_exp_ptr,
    target_logit_ptr,
    experts,
    tokens,
    columns,
    inner,
    splits,
    vocab_start,
    ignore_index,
    soft_cap,
    expert_stride,
    token_stride,
    HEAD_DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGN: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """m = max l, sum exp(l - m), and l[target] for a block of tokens of one expert and one vocabulary split.

    l = hidden @ head.T in float32, computed block by block and reduced immediately (online softmax). Each program
    writes its own elements of [splits, experts, tokens], so the result does not depend on scheduling.

    hidden [experts, tokens, inner]; heads_ptr int64 [experts, 2], the address and row stride of each head
    [columns, inner]; ALIGN, a number of bytes that divides every row address.
    """
    # GROUP blocks of tokens process each split while its rows of the head are in the L2 cache.
    program = tl.program_id(0)
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    expert = program // (token_blocks * splits)
    program = program % (token_blocks * splits)
    first_block = program // (GROUP * splits) * GROUP
    group = min(token_blocks - first_block, GROUP)
    program = program % (GROUP * splits)
    token_block = first_block + program % group
    split = program // group

    rows = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    valid_rows = rows < tokens
    rows = tl.minimum(rows, tokens - 1)
    k = tl.arange(0, BLOCK_K)
    hidden_ptr += expert.to(tl.int64) * expert_stride
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * token_stride + k[None, :]

    head_ptr = tl.load(heads_ptr + 2 * expert).to(tl.pointer_type(HEAD_DTYPE))
    head_stride = tl.load(heads_ptr + 2 * expert + 1)

    targets = tl.load(targets_ptr + rows)
    ignored = targets == ignore_index
    targets = tl.where(ignored, -1, targets - vocab_start)
    targets = tl.where((targets >= 0) & (targets < columns), targets, -1).to(tl.int32)

    maximum = tl.full((BLOCK_T,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), tl.float32)
    target_logit = tl.full((BLOCK_T,), -float("inf"), tl.float32)

    first = split * SPLIT
    last = min(first + SPLIT, columns)
    for start in range(first, last, BLOCK_V):
        offsets = start + tl.arange(0, BLOCK_V)
        # Columns past the end read the last row, so that every address is valid; they become -inf below.
        head_rows = tl.minimum(offsets, columns - 1).to(tl.int64)
        head_ptrs = head_ptr + head_rows[None, :] * head_stride + k[:, None]
        logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for step in range(0, inner, BLOCK_K):
            hidden_at = tl.multiple_of(hidden_ptrs + step, (1, ALIGN))
            head_at = tl.multiple_of(head_ptrs + step, (ALIGN, 1))
            if EVEN_K:
                left = tl.load(hidden_at)
                right = tl.load(head_at)
            else:
                left = tl.load(hidden_at, mask=k[None, :] < inner - step, other=0.0)
                right = tl.load(head_at, mask=k[:, None] < inner - step, other=0.0)
            logits = tl.dot(left.to(DOT_DTYPE), right.to(DOT_DTYPE), logits, input_precision="ieee")
        if SOFT_CAP:
            # tanh from a single exponential that cannot overflow.
            decay = tl.exp(-2.0 * tl.abs(logits / soft_cap))
            bounded = soft_cap * (1.0 - decay) / (1.0 + decay)
            logits = tl.where(logits < 0, -bounded, bounded)
        logits = tl.where(offsets[None, :] < last, logits, -float("inf"))

        here = tl.where(offsets[None, :] == targets[:, None], logits, -float("inf"))
        target_logit = tl.maximum(target_logit, tl.max(here, 1))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        added = tl.sum(tl.exp(logits - new_maximum[:, None]), 1)
        sum_exp = sum_exp * tl.exp(maximum - new_maximum) + added
        maximum = new_maximum

    maximum = tl.where(sum_exp == 0, -float("inf"), maximum)
    target_logit = tl.where(ignored, float("inf"), target_logit)
    out = (split.to(tl.int64) * experts + expert) * tokens + rows
    tl.store(maximum_ptr + out, maximum, mask=valid_rows)
    tl.store(sum_exp_ptr + out, sum_exp, mask=valid_rows)
    tl.store(target_logit_ptr + out, target_logit, mask=valid_rows)


@triton.jit
def combine_kernel(
    maximum_ptr,
    sum_exp_ptr,
    target_logit_ptr,
    out_maximum_ptr,
    out_sum_exp_ptr,
    out_target_logit_ptr,
    rows,
    splits,
    BLOCK: tl.constexpr,
):
    """Reduce the partials [splits, rows] to [rows] in split order, so that results are bit-reproducible."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = offsets < rows
    maximum = tl.full((BLOCK,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.full((BLOCK,), -float("inf"), tl.float32)
    for split in range(splits):
        at = split * tl.cast(rows, tl.int64) + offsets
        part = tl.maximum(tl.load(maximum_ptr + at, mask=valid, other=FLOOR), FLOOR)
        new_maximum = tl.maximum(maximum, part)
        part_sum = tl.load(sum_exp_ptr + at, mask=valid, other=0.0)
        sum_exp = sum_exp * tl.exp(maximum - new_maximum) + part_sum * tl.exp(part - new_maximum)
        part_target = tl.load(target_logit_ptr + at, mask=valid, other=-float("inf"))
        target_logit = tl.maximum(target_logit, part_target)
        maximum = new_maximum
    maximum = tl.where(sum_exp == 0, -float("inf"), maximum)
    tl.store(out_maximum_ptr + offsets, maximum, mask=valid)
    tl.store(out_sum_exp_ptr + offsets, sum_exp, mask=valid)
    tl.store(out_target_logit_ptr + offsets, target_logit, mask=valid)
