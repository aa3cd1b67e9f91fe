"""The Triton scoring kernels on CPU tensors, against float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from helpers.cuts import cut
from helpers.kernel_oracle import exact_token_logprobs, scoring_case, sparse_tensor

from btm_scale.kernels import combine_partials, pieces, token_logprob_partials, token_logprobs, triton_launch
from btm_scale.kernels.hardware import INTERPRETER
from btm_scale.kernels.partials import finish
from btm_scale.kernels.tuning import score_configs
from btm_scale.kernels.tuning_table import ScoreConfig


class Shape(NamedTuple):
    experts: int
    tokens: int
    hidden: int
    vocab: int


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    Shape(1, 1, 32, 111),
    Shape(3, 17, 72, 111),
    Shape(8, 257, 40, 111),
    Shape(1, 257, 64, 2000),
    Shape(3, 17, 33, 32_000),
    Shape(8, 1, 16, 50_257),
    Shape(1, 17, 24, 128_256),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
SMALL = ScoreConfig(block_t=16, block_v=64, block_k=32, split=160, group=2, warps=4, stages=1)


def worst_error(log_probs: torch.Tensor, exact: torch.Tensor) -> float:
    return float((log_probs - exact).abs().max())


@pytest.mark.parametrize(
    "case", cut(itertools.product(FLOATS, SHAPES), lambda case: case[0] == torch.bfloat16 or case[1].vocab < 5000)
)
def test_scores_are_within_tolerance_for_every_dtype_and_odd_shape(case):
    dtype, (experts, tokens, hidden, vocab) = case
    states, heads, targets = scoring_case(experts, tokens, hidden, vocab, dtype)
    log_probs = token_logprobs(states, heads, targets)
    assert log_probs.dtype == torch.float32
    assert log_probs.max() <= 0
    assert worst_error(log_probs, exact_token_logprobs(states, heads, targets)) <= TOLERANCE[dtype]


def test_small_blocks_that_do_not_divide_the_splits_count_every_column_once():
    states, heads, targets = scoring_case(3, 37, 45, 1001)
    log_probs = finish(*triton_launch.score_partials(states, heads, targets, config=SMALL))
    assert worst_error(log_probs, exact_token_logprobs(states, heads, targets)) <= 1e-5


def test_padding_rows_are_ignored_and_a_soft_cap_bounds_the_logits():
    states, heads, targets = scoring_case(2, 17, 32, 111)
    targets %= 100
    log_probs = token_logprobs(states, heads, targets, vocab_size=100, soft_cap=5.0)
    real = [head[:100] for head in heads]
    assert worst_error(log_probs, exact_token_logprobs(states, real, targets, soft_cap=5.0)) <= 1e-5


def test_ignored_targets_get_exactly_zero_even_if_all_are_ignored():
    states, heads, targets = scoring_case(2, 17, 32, 111)
    with_ignored = targets.clone()
    with_ignored[3] = -100
    log_probs, unmasked = token_logprobs(states, heads, with_ignored), token_logprobs(states, heads, targets)
    assert (log_probs[:, 3] == 0).all()
    assert torch.equal(log_probs[:, 4:], unmasked[:, 4:])
    assert (token_logprobs(states, heads, torch.full_like(targets, -100)) == 0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_on_all_logits_changes_nothing(offset):
    states, heads, targets = scoring_case(2, 17, 32, 3000)
    # Multiples of 1/16 make every partial sum exact in float32, so any error is the kernel's.
    states, heads = (states * 16).round() / 16, [(head * 16).round() / 16 for head in heads]
    states[:, :, 0] = 1.0
    for head in heads:
        head[:, 0] = offset
    log_probs = token_logprobs(states, heads, targets)
    assert worst_error(log_probs, exact_token_logprobs(states, heads, targets)) <= 1e-5


def test_blocks_of_impossible_tokens_do_not_give_nan():
    states, heads, targets = scoring_case(1, 17, 32, 9000)
    states = states.abs() + 0.1
    impossible = score_configs(INTERPRETER, 32, 17, 32)[0].split + 100
    heads[0][:impossible] = -float("inf")
    targets[:] = impossible + torch.arange(17)
    targets[5] = 7
    log_probs = token_logprobs(states, heads, targets)
    exact = exact_token_logprobs(states, [heads[0][impossible:]], (targets - impossible).clamp(min=0))
    possible = torch.arange(17) != 5
    assert log_probs[0, 5] == -float("inf")
    assert worst_error(log_probs[:, possible], exact[:, possible]) <= 1e-5


def test_shards_combine_to_the_full_vocabularys_scores_in_fixed_order():
    states, heads, targets = scoring_case(1, 37, 32, 300)
    targets = targets % 250
    targets[0] = -100
    shards = [
        token_logprob_partials(states[0], heads[0][start : start + 100], targets, vocab_start=start, vocab_size=250)
        for start in (0, 100, 200)
    ]
    padding = token_logprob_partials(states[0], heads[0][:50], targets, vocab_start=300, vocab_size=250)
    assert (padding[0] == -float("inf")).all()
    assert (padding[1] == 0).all()
    log_probs = combine_partials([*shards, padding])
    assert log_probs[0] == 0
    exact = exact_token_logprobs(states, [heads[0][:250]], targets.clamp(min=0))[0]
    assert worst_error(log_probs[1:], exact[1:]) <= 1e-5
    stacked = tuple(torch.stack(parts) for parts in zip(*shards, padding, strict=True))
    assert torch.equal(combine_partials(stacked), log_probs)


def test_nan_raises_with_its_index():
    states, heads, targets = scoring_case(2, 17, 32, 111)
    states[1, 4, 3] = float("nan")
    with pytest.raises(FloatingPointError, match=r"\[1, 4\]"):
        token_logprobs(states, heads, targets)


def test_scores_are_bit_identical_for_any_split_into_launches(monkeypatch):
    states, heads, targets = scoring_case(3, 150, 32, 5000)
    once = token_logprobs(states, heads, targets)
    assert torch.equal(token_logprobs(states, heads, targets), once)
    monkeypatch.setattr(pieces, "PARTIAL_BYTES", 1)
    assert torch.equal(token_logprobs(states, heads, targets), once)
    alone = [token_logprobs(states[e : e + 1], heads[e : e + 1], targets)[0] for e in range(3)]
    assert torch.equal(torch.stack(alone), once)


def test_heads_of_any_stride_and_dtype_are_read_in_place():
    states, heads, targets = scoring_case(2, 17, 32, 200)
    wide = torch.zeros(200, 50)
    wide[:, 7:39] = heads[1]
    mixed = [heads[0].bfloat16(), heads[1].t().contiguous().t().bfloat16()]
    log_probs = token_logprobs(states, [heads[0], wide[:, 7:39]], targets)
    assert worst_error(log_probs, exact_token_logprobs(states, heads, targets)) <= 1e-5
    log_probs = token_logprobs(states, mixed, targets)
    assert worst_error(log_probs, exact_token_logprobs(states, mixed, targets)) <= 1e-5


def test_offsets_beyond_2_to_the_31_address_the_right_memory():
    near, heads, targets = scoring_case(2, 17, 32, 40)
    far = sparse_tensor((2, 17, 32), (2**31 + 64, 2**27 + 32, 1), torch.float32)
    far.copy_(near)
    far_head = sparse_tensor((40, 32), (2**26 + 32, 1), torch.float32)
    far_head.copy_(heads[1])
    assert torch.equal(token_logprobs(far, [heads[0], far_head], targets), token_logprobs(near, heads, targets))
