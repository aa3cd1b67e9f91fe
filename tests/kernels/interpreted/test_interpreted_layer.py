"""The Triton kernels of a layer on CPU tensors, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cuts import cut
from helpers.layer_cases import (
    FLOATS,
    KINDS,
    assert_gelu_is_exact,
    assert_norm_is_exact,
    assert_rotation_is_exact,
    gelu_case,
    norm_case,
    rotary_case,
)

from btm_scale.kernels import add_norm, add_norm_backward, last_path, layer_launch, split_rotated
from btm_scale.kernels.layer_tuning import ColumnsConfig

# Fewer rows than programs, more, and a width that no block divides.
SHAPES = [(1, 1, 64), (3, 2, 100), (134, 2, 96), (2, 1, 5000)]


@pytest.mark.parametrize(
    "case",
    cut(
        itertools.product(FLOATS, SHAPES, KINDS),
        lambda case: case[1] == (3, 2, 100) or (case[0] == torch.bfloat16 and case[2] == "RMS norm of a sum"),
    ),
)
def test_norms_and_their_gradients_are_exact_for_every_dtype_and_odd_shape(case):
    dtype, shape, kind = case
    assert_norm_is_exact(norm_case(shape, dtype, kind))
    assert last_path("add_norm").backend == last_path("add_norm_backward").backend == "triton"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("groups", "per", "size"), [(3, 1, 64), (2, 3, 12), (1, 8, 128), (40, 1, 80)])
def test_rotations_and_their_gradients_are_exact(dtype, groups, per, size):
    assert_rotation_is_exact(rotary_case(3, 2, groups, per, size, dtype))
    assert last_path("split_rotated").backend == last_path("join_rotated").backend == "triton"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 2, 100), (300, 2, 96), (2, 1, 5000)])
def test_gradients_of_gelu_are_exact(dtype, shape):
    assert_gelu_is_exact(*gelu_case(shape, dtype))
    assert last_path("bias_gelu_backward").backend == "triton"


def test_the_sums_of_many_rows_do_not_depend_on_their_division_beyond_float32():
    case = norm_case((130, 40), torch.float32, "layer norm of a sum with bias")
    total, _, mean, scale = add_norm(case.added, case.weight, residual=case.residual, shift=case.shift)
    arguments = case.gradient, case.upstream, total, case.weight, mean, scale, True, True
    results = [
        layer_launch.add_norm_backward(*arguments, config=ColumnsConfig(64, 4, programs)) for programs in (1, 7, 264)
    ]
    for result, sums in results[1:]:
        assert torch.equal(result, results[0][0])
        torch.testing.assert_close(sums, results[0][1], atol=1e-4, rtol=1e-5)


def test_nan_stays_in_its_row_and_its_head():
    case = norm_case((4, 64), torch.float32, "RMS norm")
    case.added[1, 3] = float("nan")
    total, normed, mean, scale = add_norm(case.added, case.weight)
    assert normed.isnan().any(1).tolist() == [False, True, False, False]
    result, _ = add_norm_backward(case.upstream, total, case.weight, mean, scale)
    assert result.isnan().any(1).tolist() == [False, True, False, False]
    mixed, cos, sin = rotary_case(2, 1, 2, 1, 8, torch.float32)
    mixed[0, 0, 1, 0, 2] = float("nan")
    query, key = split_rotated(mixed, cos, sin)
    assert query.isnan().sum() == 2
    assert not key.isnan().any()
