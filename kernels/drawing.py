"""Triton kernel: sample a token of each row from the experts' mixture, and add it to the running log-likelihoods."""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from btm_scale.kernels.mixing import SIZES, mixture_block, normalizer, row_and_block, weights


@triton.jit(do_not_specialize=SIZES)
def draw_kernel(
    logits_ptr,
    log_weights_ptr,
    normalizers_ptr,
    seed_ptr,
    candidates_ptr,
    tokens_ptr,
    out_token_ptr,
    out_log_prob_ptr,
    log_likelihood_ptr,
    temperature,
    experts,
    batch,
    vocabulary,
    expert_stride,
    row_stride,
    weight_stride,
    likelihood_stride,
    GREEDY: tl.constexpr,
    UPDATE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Take the argmax of log p / temperature + Gumbel noise, an exact sample from p ** (1 / temperature), of each row.

    Each program writes the best token of its block: candidates [2, batch, blocks] of (score, log p), and tokens
    [batch, blocks + 1], whose last column counts the row's finished blocks. The program that finishes a row picks the
    best of its blocks, in their order, so the result does not depend on scheduling. A token's noise depends only on
    the seed, its row and its index, not on how the work is divided.
    """
    blocks = tl.cdiv(vocabulary, BLOCK)
    row, block = row_and_block(batch, blocks)
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
    score = log_probs
    if not GREEDY:
        zeros = tl.zeros((BLOCK,), tl.int32)
        bits, _, _, _ = tl.philox(tl.load(seed_ptr), offsets, zeros + row, zeros, zeros)
        uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1.0 - 2.0**-24)
        # -log(1 - u), as a series where 1 - u would round: the smallest u give the largest noise.
        series = uniform * (1.0 + uniform * (1.0 / 2 + uniform * (1.0 / 3 + uniform * (1.0 / 4))))
        exponential = tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))
        score = log_probs / temperature - tl.log(exponential)
    score = tl.where((offsets < vocabulary) & (score == score), score, -float("inf"))
    best, column = tl.max(score, 0, return_indices=True)
    chosen = tl.arange(0, BLOCK) == column
    at = row * blocks + block
    tl.store(candidates_ptr + at, best)
    tl.store(candidates_ptr + batch * blocks + at, tl.sum(tl.where(chosen, log_probs, 0.0), 0))
    tokens_ptr += row * (blocks + 1)
    tl.store(tokens_ptr + block, tl.sum(tl.where(chosen, offsets, 0), 0))
    tl.debug_barrier()  # all of the program's results are written before it counts as finished
    finished = tl.atomic_add(tokens_ptr + blocks, 1, sem="acq_rel")
    if finished == blocks - 1:
        _pick(
            logits_ptr,
            log_weights_ptr,
            normalizers_ptr,
            candidates_ptr,
            tokens_ptr,
            out_token_ptr,
            out_log_prob_ptr,
            log_likelihood_ptr,
            row,
            experts,
            batch,
            blocks,
            tl.cdiv(vocabulary, SPLIT),
            expert_stride,
            row_stride,
            weight_stride,
            likelihood_stride,
            UPDATE,
            EXPERTS,
            SPLITS,
            BLOCKS,
        )


@triton.jit
def _pick(
    logits_ptr,
    log_weights_ptr,
    normalizers_ptr,
    candidates_ptr,
    tokens_ptr,
    out_token_ptr,
    out_log_prob_ptr,
    log_likelihood_ptr,
    row,
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
    block = tl.arange(0, BLOCKS)
    # Other programs wrote these while this one ran, so the first-level cache must not answer.
    at = candidates_ptr + row * blocks + block
    scores = tl.load(at, mask=block < blocks, other=-float("inf"), cache_modifier=".cg")
    best, winner = tl.max(scores, 0, return_indices=True)
    token = tl.load(tokens_ptr + winner, cache_modifier=".cg")
    log_prob = tl.load(candidates_ptr + (batch + row) * blocks + winner, cache_modifier=".cg")

    _top_weight, check = weights(log_weights_ptr, row, experts, weight_stride, EXPERTS)
    for expert in range(experts):
        log_weight = tl.load(log_weights_ptr + row.to(tl.int64) * weight_stride + expert)
        _top, log_sum = normalizer(normalizers_ptr, row, expert, experts, batch, splits, SPLITS)
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
            top, log_sum = normalizer(normalizers_ptr, row, expert, experts, batch, splits, SPLITS)
            leave = no_token | (log_weight == -float("inf"))
            logit = tl.load(at + tl.cast(expert, tl.int64) * expert_stride, mask=leave == 0, other=0.0)
            gain = tl.where(log_sum == -float("inf"), -float("inf"), (logit.to(tl.float32) - top) - log_sum)
            running = log_likelihood_ptr + row.to(tl.int64) * likelihood_stride + expert
            old = tl.load(running)
            tl.store(running, tl.where(leave, old, old + gain.to(old.dtype)))
