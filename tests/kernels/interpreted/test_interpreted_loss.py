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
SHAPES = [(1, 111, 111), (5, 111, 100), (3, 4096, 4096), (4, 8208, 8193), (2, 50_257, 50_257), (2, 50_304, 50_257)]
NARROW = LossConfig(block=64, warps=4)
KEPT = LossConfig(block=64, warps=4, kept=8)
INF = float("inf")


@pytest.mark.parametrize(
    "case", cut(itertools.product(FLOATS, SHAPES), lambda case: case[0] == torch.bfloat16 or case[1][1] < 5000)
)
def test_losses_and_gradients_are_exact_for_every_dtype_and_odd_shape(case):
    dtype, (tokens, rows, vocab) = case
    assert_exact(*loss_case(tokens, rows, vocab, dtype), vocab)
    stays = dtype != torch.float32 and rows % 16 == 0
    assert str(last_path("cross_entropy_")) == (f"triton {-(-rows // 4096)}x4096" if stays else "triton 4096")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 200.0])
def test_a_row_in_registers_is_as_exact_as_one_that_is_read_twice(dtype, offset):
    logits, targets = loss_case(16, 512, 499, dtype)
    logits += offset
    losses, gradient = exact_loss(logits, targets, 499)
    errors = []
    for config in (KEPT, KEPT._replace(kept=0)):
        changed = logits.clone()
        ours = loss_launch.cross_entropy_(changed, targets, vocab_size=499, config=config)
        errors.append(((ours - losses).square().mean(), (changed - gradient).square().mean()))
    (loss, change), (twice_loss, twice_change) = errors
    assert loss <= 1.25 * twice_loss
    assert change <= 1.01 * twice_change


def test_a_target_outside_of_the_vocabulary_changes_no_other_row():
    logits, targets = loss_case(3, 512, 500, torch.bfloat16)
    expected = logits.clone()
    loss_launch.cross_entropy_(expected, targets, vocab_size=500, config=KEPT)
    for outside in (-100, 500, 600):
        changed, wrong = logits.clone(), targets.clone()
        wrong[1] = outside
        losses = loss_launch.cross_entropy_(changed, wrong, vocab_size=500, config=KEPT)
        assert torch.equal(changed[::2], expected[::2])
        assert losses.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_shards_of_the_vocabulary_give_the_losses_and_gradients_of_all(dtype, shards):
    assert_shards_are_exact(*loss_case(7, 300, 290, dtype), 290, shards)


def test_a_shard_of_padding_alone_adds_nothing():
    logits, targets = loss_case(4, 90, 90, torch.float32)
    assert_shards_are_exact(torch.cat([logits, torch.full((4, 90), 50.0)], dim=1), targets, 90, 2)


@pytest.mark.parametrize(("dtype", "rows", "config"), [(torch.float32, 1000, NARROW), (torch.bfloat16, 502, KEPT)])
def test_a_row_has_the_same_bits_with_and_without_neighbours_if_no_block_divides_it(dtype, rows, config):
    logits, targets = loss_case(3, rows, rows, dtype)
    alone = logits[1:2].clone()
    losses = loss_launch.cross_entropy_(logits, targets, vocab_size=None, config=config)
    loss = loss_launch.cross_entropy_(alone, targets[1:2], vocab_size=None, config=config)
    assert torch.equal(losses[1:2], loss)
    assert torch.equal(logits[1:2], alone)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_large_offset_changes_nothing(offset):
    logits, targets = loss_case(3, 500, 500, torch.float32)
    expected, _ = exact_loss(logits + offset, targets, 500)
    assert (cross_entropy_(logits + offset, targets) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(("dtype", "path"), [(torch.float32, "triton 4096"), (torch.bfloat16, "triton 1x4096")])
def test_nan_and_infinity_make_the_loss_of_their_row_nan(dtype, path):
    logits, targets = loss_case(5, 512, 512, dtype)
    logits[1, 7] = float("nan")
    logits[2, 300] = INF
    logits[3, :100] = -INF
    targets[3] = 200
    losses = cross_entropy_(logits, targets)
    assert losses.isnan().tolist() == [False, True, True, False, False]
    assert losses[[0, 3, 4]].isfinite().all()
    assert str(last_path("cross_entropy_")) == path


@pytest.mark.parametrize(("rows", "path"), [(200, "triton 4096"), (208, "triton 1x4096")])
def test_rows_more_than_two_billion_elements_apart_are_read_and_written_in_place(rows, path):
    logits = sparse_tensor((2, rows), (2_200_000_000, 1), torch.bfloat16)
    values, targets = loss_case(2, rows, rows, torch.bfloat16)
    logits.copy_(values)
    maximum, _, _ = logit_partials(logits, targets)
    assert torch.equal(maximum, values.float().amax(1))
    assert_exact(logits, targets, rows)
    assert str(last_path("cross_entropy_")) == path
