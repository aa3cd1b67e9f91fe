"""Triton kernels: log-probability partials of many experts' tokens from hidden states, with no logits in memory."""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# The lowest finite float32, so that the difference of two maxima is never (-inf) - (-inf).
FLOOR = tl.constexpr(-3.4028234663852886e38)


_LOG2_E = tl.constexpr(1.4426950408889634)

# Sizes that change from call to call without effect on the machine code.
_SIZES = ["experts", "tokens", "columns", "splits", "split_columns", "vocab_start", "ignore_index", "soft_cap"]
_COMBINED_SIZES = ["tokens", "rows", "splits", "out_stride", "out_plane"]


@triton.jit(do_not_specialize=_SIZES)
def score_kernel(
    hidden_ptr,
    heads_ptr,
    targets_ptr,
    partials_ptr,
    experts,
    tokens,
    columns,
    inner,
    splits,
    split_columns,
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
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """m = max l, sum exp(l - m), and l[target] for a block of tokens of one expert and one vocabulary split.

    l = hidden @ head.T in float32, computed block by block and reduced immediately (online softmax). Each program
    writes its own elements of partials [3, splits, experts, tokens], so the result does not depend on scheduling.

    hidden [experts, tokens, inner]; heads_ptr int64 [experts, 2], the address and row stride of each head
    [columns, inner]; split_columns, a multiple of BLOCK_V; ALIGN, a number of bytes that divides every row address.
    """
    tl.assume(inner > 0)  # otherwise the accumulators are cleared a second time, for a loop without steps
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
    # The last block begins earlier, so that every address is valid; what was counted before it becomes -inf below.
    columns_here = tl.arange(0, BLOCK_V)
    last_block = max(columns - BLOCK_V, 0)
    head_ptrs = head_ptr + tl.minimum(columns_here, columns - 1).to(tl.int64)[None, :] * head_stride + k[:, None]

    targets = tl.load(targets_ptr + rows)
    ignored = targets == ignore_index
    targets = tl.where(ignored, -1, targets - vocab_start)
    targets = tl.where((targets >= 0) & (targets < columns), targets, -1).to(tl.int32)

    maximum = tl.full((BLOCK_T,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK_T,), tl.float32)
    target_logit = tl.full((BLOCK_T,), -float("inf"), tl.float32)

    cap_scale = -2.0 * _LOG2_E / soft_cap
    first = split * split_columns
    last = min(first + split_columns, columns)
    for start in range(first, last, BLOCK_V):
        first_column = min(start, last_block)
        offsets = first_column + columns_here
        block_offset = tl.cast(first_column, tl.int64) * head_stride
        logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for step in range(0, inner, BLOCK_K):
            hidden_at = tl.multiple_of(hidden_ptrs + step, (1, ALIGN))
            head_at = tl.multiple_of(head_ptrs + (block_offset + step), (ALIGN, 1))
            if EVEN_K:
                left = tl.load(hidden_at)
                right = tl.load(head_at)
            else:
                left = tl.load(hidden_at, mask=k[None, :] < inner - step, other=0.0)
                right = tl.load(head_at, mask=k[:, None] < inner - step, other=0.0)
            logits = tl.dot(left.to(DOT_DTYPE), right.to(DOT_DTYPE), logits, input_precision="ieee")
        if SOFT_CAP:
            # tanh from a single exponential that cannot overflow.
            decay = tl.exp2(tl.abs(logits) * cap_scale)
            bounded = soft_cap * (1.0 - decay) / (1.0 + decay)
            logits = tl.where(logits < 0, -bounded, bounded)
        # Two branches that few blocks take: the instructions per logit are what limits this part.
        if start + BLOCK_V > last:
            # As unsigned numbers, columns before `start` are large.
            is_new = (offsets - start).to(tl.uint32, bitcast=True) < (last - start).to(tl.uint32, bitcast=True)
            logits = tl.where(is_new[None, :], logits, -float("inf"))
        is_here = (targets >= start) & (targets < start + BLOCK_V)
        if tl.max(is_here.to(tl.int32), 0) > 0:
            here = tl.where(columns_here[None, :] == (targets - first_column)[:, None], logits, -float("inf"))
            target_logit = tl.maximum(target_logit, tl.max(here, 1))
        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        # The difference first: the product of a large logit with log2(e) would round.
        added = tl.sum(tl.exp2((logits - new_maximum[:, None]) * _LOG2_E), 1)
        sum_exp = sum_exp * tl.exp2((maximum - new_maximum) * _LOG2_E) + added
        maximum = new_maximum

    maximum = tl.where(sum_exp == 0, -float("inf"), maximum)
    target_logit = tl.where(ignored, float("inf"), target_logit)
    out = partials_ptr + (split.to(tl.int64) * experts + expert) * tokens + rows
    plane = tl.cast(splits, tl.int64) * experts * tokens
    tl.store(out, maximum, mask=valid_rows)
    tl.store(out + plane, sum_exp, mask=valid_rows)
    tl.store(out + 2 * plane, target_logit, mask=valid_rows)


@triton.jit(do_not_specialize=_COMBINED_SIZES)
def combine_kernel(
    partials_ptr,
    out_ptr,
    tokens,
    rows,
    splits,
    out_stride,
    out_plane,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Reduce the partials [3, splits, rows], in an order that depends on `splits` alone; rows are [experts, tokens].

    Writes (maximum, sum_exp, target_logit) [3, experts, tokens], or with FINISH the targets' log-probabilities
    [experts, tokens]. `out_stride` and `out_plane` are the strides of the first dimensions from the last to the first.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    plane = tl.cast(splits, tl.int64) * rows
    maximum = tl.full((BLOCK,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    target_logit = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        exists = (split < splits)[:, None] & valid[None, :]
        at = partials_ptr + split.to(tl.int64)[:, None] * rows + row[None, :]
        parts = tl.maximum(tl.load(at, mask=exists, other=FLOOR), FLOOR)
        part_sums = tl.load(at + plane, mask=exists, other=0.0)
        part_targets = tl.load(at + 2 * plane, mask=exists, other=-float("inf"))
        new_maximum = tl.maximum(maximum, tl.max(parts, 0))
        added = tl.sum(part_sums * tl.exp(parts - new_maximum[None, :]), 0)
        sum_exp = sum_exp * tl.exp(maximum - new_maximum) + added
        target_logit = tl.maximum(target_logit, tl.max(part_targets, 0))
        maximum = new_maximum
    maximum = tl.where(sum_exp == 0, -float("inf"), maximum)
    out = out_ptr + (row // tokens).to(tl.int64) * out_stride + row % tokens
    if FINISH:
        # As `partials.finish`.
        shift = tl.where(maximum == -float("inf"), 0.0, maximum)
        log_prob = (target_logit - shift) - tl.log(sum_exp)
        log_prob = tl.where((target_logit == -float("inf")) & (sum_exp == sum_exp), -float("inf"), log_prob)
        log_prob = tl.where((target_logit == float("inf")) & (maximum < float("inf")), 0.0, log_prob)
        tl.store(out, tl.where(log_prob > 0, 0.0, log_prob), mask=valid)
    else:
        tl.store(out, maximum, mask=valid)
        tl.store(out + out_plane, sum_exp, mask=valid)
        tl.store(out + 2 * out_plane, target_logit, mask=valid)
