"""Triton kernels: the mixture of the experts' next-token distributions.

Two launches for any number of rows: `normalizer_kernel` computes each expert's maximum and sum of exponentials, then
`mix_kernel`, or `draw_kernel` of drawing.py, forms the mixture block by block. Neither reads an expert of zero weight.
The second launch begins with the rows that the first one read last, which the cache still holds.
"""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from btm_scale.kernels.scoring import FLOOR

# Sizes that change from call to call without effect on the machine code.
SIZES = ["experts", "batch", "weight_stride", "likelihood_stride", "temperature"]


@triton.jit(do_not_specialize=SIZES)
def normalizer_kernel(
    logits_ptr,
    log_weights_ptr,
    normalizers_ptr,
    tokens_ptr,
    experts,
    batch,
    vocabulary,
    blocks,
    expert_stride,
    row_stride,
    weight_stride,
    DRAW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m = max_v l_v and sum_v exp(l_v - m) for one row of one expert and one vocabulary split.

    logits [experts, batch, vocabulary]; normalizers [2, batch, experts, splits]. An empty split gives (FLOOR, 0). For
    `draw_kernel` it also clears the last column of tokens [batch, blocks + 1], the number of finished blocks.
    """
    splits = tl.cdiv(vocabulary, SPLIT)
    program = tl.program_id(0)
    split = program % splits
    expert = (program // splits) % experts
    row = program // (splits * experts)
    silent = tl.load(log_weights_ptr + row.to(tl.int64) * weight_stride + expert) == -float("inf")
    logits_ptr += expert.to(tl.int64) * expert_stride + row.to(tl.int64) * row_stride

    maximum = tl.full((BLOCK,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    first = split * SPLIT
    last = min(first + SPLIT, vocabulary)
    last = tl.where(silent, first, last)
    for start in range(first, last, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + offsets, mask=offsets < last, other=-float("inf")).to(tl.float32)
        difference = logits - maximum
        decay = tl.exp(-tl.abs(difference))
        sum_exp = tl.where(difference > 0, sum_exp * decay + 1.0, sum_exp + decay)
        maximum = tl.maximum(maximum, logits)
    top = tl.max(maximum, 0)
    total = tl.sum(sum_exp * tl.exp(maximum - top), 0)
    total = tl.where(top == float("inf"), float("nan"), total)  # otherwise only the infinite token would be NaN
    tl.store(normalizers_ptr + program, top)
    tl.store(normalizers_ptr + tl.num_programs(0) + program, total)
    if DRAW:
        tl.store(tokens_ptr + row * (blocks + 1) + blocks, 0, mask=program % (splits * experts) == 0)


@triton.jit
def normalizer(normalizers_ptr, row, expert, experts, batch, splits, SPLITS: tl.constexpr):
    """Return (maximum, log of the sum) of one expert's row, reduced over its splits in a fixed order."""
    split = tl.arange(0, SPLITS)
    at = normalizers_ptr + (row * experts + expert) * splits + split
    maxima = tl.load(at, mask=split < splits, other=FLOOR)
    sums = tl.load(at + batch * experts * splits, mask=split < splits, other=0.0)
    top = tl.max(maxima, 0)
    return top, tl.log(tl.sum(sums * tl.exp(maxima - top), 0))


@triton.jit
def weights(log_weights_ptr, row, experts, weight_stride, EXPERTS: tl.constexpr):
    """Return a row's largest log weight (0 if all are -inf), and the log of the sum of weights relative to it."""
    expert = tl.arange(0, EXPERTS)
    at = log_weights_ptr + row.to(tl.int64) * weight_stride + expert
    log_weights = tl.load(at, mask=expert < experts, other=-float("inf"))
    top = tl.max(log_weights, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.log(tl.sum(tl.exp((log_weights - top).to(tl.float32)), 0))


@triton.jit
def row_and_block(batch, blocks):
    """Return the program's row, the last one first, and its block of the vocabulary."""
    return batch - 1 - tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def mixture_block(
    logits_ptr,
    log_weights_ptr,
    normalizers_ptr,
    row,
    offsets,
    experts,
    batch,
    vocabulary,
    expert_stride,
    row_stride,
    weight_stride,
    EXPERTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return log sum_e w_e softmax(l_e) at `offsets` of one row, with one exponential per logit."""
    splits = tl.cdiv(vocabulary, SPLIT)
    top_weight, log_total = weights(log_weights_ptr, row, experts, weight_stride, EXPERTS)
    logits_ptr += row.to(tl.int64) * row_stride
    maximum = tl.full((BLOCK,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    for expert in range(experts):
        log_weight = tl.load(log_weights_ptr + row.to(tl.int64) * weight_stride + expert)
        top, log_sum = normalizer(normalizers_ptr, row, expert, experts, batch, splits, SPLITS)
        # Experts without weight or without a possible token add nothing and are not read.
        silent = (log_weight == -float("inf")) | (log_sum == -float("inf"))
        at = logits_ptr + tl.cast(expert, tl.int64) * expert_stride + offsets
        logits = tl.load(at, mask=(offsets < vocabulary) & (silent == 0), other=-float("inf")).to(tl.float32)
        bias = (log_weight - top_weight).to(tl.float32) - log_sum
        term = tl.where(silent, -float("inf"), (logits - top) + bias)
        difference = term - maximum
        decay = tl.exp(-tl.abs(difference))
        sum_exp = tl.where(difference > 0, sum_exp * decay + 1.0, sum_exp + decay)
        maximum = tl.maximum(maximum, term)
    log_probs = maximum + tl.log(sum_exp)
    log_probs = tl.where(sum_exp == 0, -float("inf"), log_probs - log_total)
    # A comparison keeps NaN where tl.minimum would hide it.
    return tl.where(log_probs > 0, 0.0, log_probs)


@triton.jit(do_not_specialize=SIZES)
def mix_kernel(
    logits_ptr,
    log_weights_ptr,
    normalizers_ptr,
    mixture_ptr,
    experts,
    batch,
    vocabulary,
    expert_stride,
    row_stride,
    weight_stride,
    EXPERTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log sum_e w_e softmax(l_e) for one row and vocabulary block, into mixture [batch, vocabulary]."""
    row, block = row_and_block(batch, tl.cdiv(vocabulary, BLOCK))
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    log_probs = mixture_block(
        logits_ptr,
        log_weights_ptr,
        normalizers_ptr,
        row,
        offsets,
        experts,
        batch,
        vocabulary,
        expert_stride,
        row_stride,
        weight_stride,
        EXPERTS,
        SPLIT,
        SPLITS,
        BLOCK,
    )
    at = mixture_ptr + row.to(tl.int64) * vocabulary + offsets
    tl.store(at, log_probs, mask=offsets < vocabulary)
