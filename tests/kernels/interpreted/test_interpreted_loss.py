"""The Triton kernels of the loss on CPU tensors, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cuts import cut
from helpers.kernel_oracle import sparse_tensor
from helpers.loss_cases import assert_exact, assert_shards_are_exact, exact_loss, loss_case

from btm_scale.kernels import cross_entropy_, last_path, logit_partials, loss_launch
from btm_scale.kernels.loss_tuning import LossConfig

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 111, 111), (5, 111, 100), (3, 4096, 4096), (2, 50_257, 50_257), (2, 50_304, 50_257)]
NARROW = LossConfig(block=64, warps=4)
INF = float("inf")


@pytest.mark.parametrize(
    "case", cut(itertools.product(FLOATS, SHAPES), lambda case: case[0] == torch.bfloat16 or case[1][1] < 5000)
)
def test_losses_and_gradients_are_exact_for_every_dtype_and_odd_shape(case):
    dtype, (tokens, rows, vocab) = case
    assert_exact(*loss_case(tokens, rows, vocab, dtype), vocab)
    assert str(last_path("cross_entropy_")) == "triton 4096"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_of_the_vocabulary_give_the_losses_and_gradients_of_all(dtype, shards):
    assert_shards_are_exact(*loss_case(7, 300, 290, dtype), 290, shards)


def test_a_shard_of_padding_alone_adds_nothing():
    logits, targets = loss_case(4, 90, 90, torch.float32)
    assert_shards_are_exact(torch.cat([logits, torch.full((4, 90), 50.0)], dim=1), targets, 90, 2)


def test_a_row_has_the_same_bits_with_and_without_neighbours_if_no_block_divides_it():
    logits, targets = loss_case(3, 1000, 1000, torch.float32)
    alone = logits[1:2].clone()
    losses = loss_launch.cross_entropy_(logits, targets, vocab_size=None, config=NARROW)
    loss = loss_launch.cross_entropy_(alone, targets[1:2], vocab_size=None, config=NARROW)
    assert torch.equal(losses[1:2], loss)
    assert torch.equal(logits[1:2], alone)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_changes_nothing(offset):
    logits, targets = loss_case(3, 500, 500, torch.float32)
    expected, _ = exact_loss(logits + offset, targets, 500)
    assert (cross_entropy_(logits + offset, targets) - expected).abs().max() <= 1e-5


def test_nan_and_infinity_make_the_loss_of_their_row_nan():
    logits, targets = loss_case(4, 500, 500, torch.float32)
    logits[1, 7] = float("nan")
    logits[2, 300] = INF
    losses = cross_entropy_(logits, targets)
    assert losses.isnan().tolist() == [False, True, True, False]


def test_rows_more_than_two_billion_elements_apart_are_read_and_written_in_place():
    logits = sparse_tensor((2, 200), (2_200_000_000, 1), torch.bfloat16)
    values, targets = loss_case(2, 200, 200, torch.bfloat16)
    logits.copy_(values)
    maximum, _, _ = logit_partials(logits, targets)
    assert torch.equal(maximum, values.float().amax(1))
    assert_exact(logits, targets, 200)
