"""The RMS norm for a CPU has the bits of PyTorch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from btm_scale.model.norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 8, 256), (7, 3, 5), (33, 2, 4, 24), (4, 0, 16)])
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_have_the_bits_of_pytorch(
    shape: tuple[int, ...], dtype: torch.dtype, transposed: bool
) -> None:
    values, upstream = (numbers(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    if transposed:
        values, upstream = values.transpose(0, 1), upstream.transpose(0, 1)
    values[:1] = 0  # a row whose norm is the epsilon alone
    weight = (1 + numbers(shape[-1], dtype=torch.float32, seed=2) / 10).to(dtype)
    values.requires_grad_()
    weight.requires_grad_()
    result, expected = rms_norm(values, weight, 1e-5), functional.rms_norm(values, weight.shape, weight, 1e-5)
    assert torch.equal(result, expected)
    found, exact = (torch.autograd.grad(one, (values, weight), upstream) for one in (result, expected))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_a_frozen_weight_has_no_gradient() -> None:
    values = numbers(5, 8, dtype=torch.float32, seed=0).requires_grad_()
    weight = torch.full((8,), 0.5)
    rms_norm(values, weight, 1e-5).square().sum().backward()
    ours, values.grad = values.grad, None
    functional.rms_norm(values, (8,), weight, 1e-5).square().sum().backward()
    assert ours is not None
    assert values.grad is not None
    assert torch.equal(ours, values.grad)
    assert weight.grad is None
