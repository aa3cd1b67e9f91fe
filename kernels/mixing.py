"""Triton kernels: the mixture of the experts' next-token distributions, and sampling from it.

Two passes over the logits of a few rows at a time, the second from the cache: `normalizer_kernel` computes each
expert's maximum and sum of exponentials, then `mix_kernel` or `draw_kernel` forms the mixture block by block. Neither
reads an expert of zero weight.
"""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from btm_scale.kernels.scoring import FLOOR


@triton.jit
def normalizer_kernel(
    logits_ptr,
    log_weights_ptr,
    maximum_ptr,
    sum_exp_ptr,
    batch,
    vocabulary,
    splits,
    expert_stride,
    row_stride,
    weight_stride,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """m = max_v l_v and sum_v exp(l_v - m) for one row of one expert and one vocabulary split.

    logits [experts, batch, vocabulary]; partials [experts, batch, splits]. An empty split gives (FLOOR, 0).
    """
    program = tl.program_id(0)
    split = program % splits
    row = (program // splits) % batch
    expert = program // (splits * batch)
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
    tl.store(maximum_ptr + program, top)
    tl.store(sum_exp_ptr + program, total)


@triton.jit
def _normalizer(maximum_ptr, sum_exp_ptr, expert, row, batch, splits, SPLITS: tl.constexpr):
    """Return (maximum, log of the sum) of one expert's row, reduced over its splits in a fixed order."""
    split = tl.arange(0, SPLITS)
    at = (expert * batch + row) * splits + split
    maxima = tl.load(maximum_ptr + at, mask=split < splits, other=FLOOR)
    sums = tl.load(sum_exp_ptr + at, mask=split < splits, other=0.0)
    top = tl.max(maxima, 0)
    return top, tl.log(tl.sum(sums * tl.exp(maxima - top), 0))


@triton.jit
def _weights(log_weights_ptr, row, experts, weight_stride, EXPERTS: tl.constexpr):
    """Return a row's largest log weight (0 if all are -inf), and the log of the sum of weights relative to it."""
    expert = tl.arange(0, EXPERTS)
    at = log_weights_ptr + row.to(tl.int64) * weight_stride + expert
    log_weights = tl.load(at, mask=expert < experts, other=-float("inf"))
    top = tl.max(log_weights, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.log(tl.sum(tl.exp((log_weights - top).to(tl.float32)), 0))


@triton.jit
def _mixture(
    logits_ptr,
    log_weights_ptr,
    maximum_ptr,
    sum_exp_ptr,
    row,
    offsets,
    experts,
    batch,
    vocabulary,
    splits,
    expert_stride,
    row_stride,
    weight_stride,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return log sum_e w_e softmax(l_e) at `offsets` of one row, with one exponential per logit."""
    top_weight, log_total = _weights(log_weights_ptr, row, experts, weight_stride, EXPERTS)
    logits_ptr += row.to(tl.int64) * row_stride
    maximum = tl.full((BLOCK,), FLOOR, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    for expert in range(experts):
        log_weight = tl.load(log_weights_ptr + row.to(tl.int64) * weight_stride + expert)
        top, log_sum = _normalizer(maximum_ptr, sum_exp_ptr, expert, row, batch, splits, SPLITS)
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


@triton.jit
def mix_kernel(
    logits_ptr,
    log_weights_ptr,
    maximum_ptr,
    sum_exp_ptr,
    mixture_ptr,
    experts,
    batch,
    vocabulary,
    splits,
    expert_stride,
    row_stride,
    weight_stride,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log sum_e w_e softmax(l_e) for one row and vocabulary block, into mixture [batch, vocabulary]."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = tl.program_id(0) // blocks
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    log_probs = _mixture(
        logits_ptr,
        log_weights_ptr,
        maximum_ptr,
        sum_exp_ptr,
        row,
        offsets,
        experts,
        batch,
        vocabulary,
        splits,
        expert_stride,
        row_stride,
        weight_stride,
        EXPERTS,
        SPLITS,
        BLOCK,
    )
    at = mixture_ptr + row.to(tl.int64) * vocabulary + offsets
    tl.store(at, log_probs, mask=offsets < vocabulary)


@triton.jit
def draw_kernel(
    logits_ptr,
    log_weights_ptr,
    maximum_ptr,
    sum_exp_ptr,
    seed_ptr,
    score_ptr,
    token_ptr,
    log_prob_ptr,
    first_row,
    temperature,
    experts,
    batch,
    vocabulary,
    splits,
    expert_stride,
    row_stride,
    weight_stride,
    GREEDY: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the argmax of log p / temperature + Gumbel noise in a block: score, token, log p, each [batch, blocks].

    The argmax over the vocabulary is an exact sample from p ** (1 / temperature). A token's noise depends only on the
    seed, its row (`first_row` + row) and its index, not on how the work is divided.
    """
    blocks = tl.cdiv(vocabulary, BLOCK)
    row = tl.program_id(0) // blocks
    offsets = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    log_probs = _mixture(
        logits_ptr,
        log_weights_ptr,
        maximum_ptr,
        sum_exp_ptr,
        row,
        offsets,
        experts,
        batch,
        vocabulary,
        splits,
        expert_stride,
        row_stride,
        weight_stride,
        EXPERTS,
        SPLITS,
        BLOCK,
    )
    score = log_probs
    if not GREEDY:
        zeros = tl.zeros((BLOCK,), tl.int32)
        bits, _, _, _ = tl.philox(tl.load(seed_ptr), offsets, zeros + (first_row + row), zeros, zeros)
        uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 2.0**-24)
        # -log(1 - u), as a series where 1 - u would round: the smallest u give the largest noise.
        series = uniform * (1.0 + uniform * (1.0 / 2 + uniform * (1.0 / 3 + uniform * (1.0 / 4))))
        exponential = tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))
        score = log_probs / temperature - tl.log(exponential)
    score = tl.where((offsets < vocabulary) & (score == score), score, -float("inf"))
    best, column = tl.max(score, 0, return_indices=True)
    chosen = tl.arange(0, BLOCK) == column
    tl.store(score_ptr + tl.program_id(0), best)
    tl.store(token_ptr + tl.program_id(0), tl.sum(tl.where(chosen, offsets, 0), 0))
    tl.store(log_prob_ptr + tl.program_id(0), tl.sum(tl.where(chosen, log_probs, 0.0), 0))


@triton.jit
def pick_kernel(
    logits_ptr,
    log_weights_ptr,
    maximum_ptr,
    sum_exp_ptr,
    score_ptr,
    token_ptr,
    log_prob_ptr,
    out_token_ptr,
    out_log_prob_ptr,
    log_likelihood_ptr,
    experts,
    batch,
    blocks,
    splits,
    expert_stride,
    row_stride,
    weight_stride,
    likelihood_stride,
    UPDATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Pick the best of a row's blocks; log_likelihood[row, e] += log softmax(l_e)[token] for every e with weight."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    scores = tl.load(score_ptr + row * blocks + block, mask=block < blocks, other=-float("inf"))
    best, winner = tl.max(scores, 0, return_indices=True)
    token = tl.load(token_ptr + row * blocks + winner)
    log_prob = tl.load(log_prob_ptr + row * blocks + winner)

    _top_weight, check = _weights(log_weights_ptr, row, experts, weight_stride, EXPERTS)
    for expert in range(experts):
        log_weight = tl.load(log_weights_ptr + row.to(tl.int64) * weight_stride + expert)
        top, log_sum = _normalizer(maximum_ptr, sum_exp_ptr, expert, row, batch, splits, SPLITS)
        check += tl.where(log_weight == -float("inf"), 0.0, log_sum)
    broken = check != check
    no_token = broken | (best == -float("inf"))
    tl.store(out_token_ptr + row, tl.where(no_token, -1, token).to(tl.int64))
    nothing = tl.where(broken, float("nan"), -float("inf"))
    tl.store(out_log_prob_ptr + row, tl.where(no_token, nothing, log_prob))

    if UPDATE:
        at = logits_ptr + row.to(tl.int64) * row_stride + token
        for expert in range(experts):
            log_weight = tl.load(log_weights_ptr + row.to(tl.int64) * weight_stride + expert)
            top, log_sum = _normalizer(maximum_ptr, sum_exp_ptr, expert, row, batch, splits, SPLITS)
            leave = no_token | (log_weight == -float("inf"))
            logit = tl.load(at + tl.cast(expert, tl.int64) * expert_stride, mask=leave == 0, other=0.0)
            gain = tl.where(log_sum == -float("inf"), -float("inf"), (logit.to(tl.float32) - top) - log_sum)
            running = log_likelihood_ptr + row.to(tl.int64) * likelihood_stride + expert
            old = tl.load(running)
            tl.store(running, tl.where(leave, old, old + gain.to(old.dtype)))
