"""Inputs of a layer's kernels, and checks of what they return against float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from btm_scale.kernels import add_norm, add_norm_backward, bias_gelu_backward, join_rotated, split_rotated
from btm_scale.kernels.hardware import is_interpreted

# Relative to the largest element: half a unit in the last place. Triton's interpreter cuts off the bits that a bfloat16
# has no room for, where a GPU rounds.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2**-7 if is_interpreted() else 2**-8, torch.float16: 2**-11}
FLOATS = list(ERROR)
EPSILON = 1e-5


class NormCase(NamedTuple):
    """Tensors of `add_norm`, and the gradients of what it returns."""

    added: Tensor
    bias: Tensor | None
    residual: Tensor | None
    weight: Tensor
    shift: Tensor | None
    upstream: Tensor
    gradient: Tensor | None


# Which of bias, residual and shift exist, and whether the total has other uses.
KINDS = {
    "RMS norm": (False, False, False, True),
    "RMS norm of a sum": (False, True, False, True),
    "last RMS norm": (False, True, False, False),
    "layer norm": (False, False, True, True),
    "layer norm of a sum with bias": (True, True, True, True),
}


def norm_case(shape: tuple[int, ...], dtype: torch.dtype, kind: str, device: torch.device | str = "cpu") -> NormCase:
    """Return random tensors [*shape] and vectors; their mean is not 0 and the weights are not 1."""
    has_bias, has_residual, has_shift, has_gradient = KINDS[kind]
    generator = torch.Generator().manual_seed(sum(shape))

    def drawn(*size: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(*size, generator=generator) + mean).to(dtype).to(device)

    hidden = shape[-1]
    return NormCase(
        drawn(*shape, mean=0.5),
        drawn(hidden) if has_bias else None,
        drawn(*shape) if has_residual else None,
        drawn(hidden, mean=1.0),
        drawn(hidden) if has_shift else None,
        drawn(*shape),
        drawn(*shape) if has_gradient else None,
    )


def assert_norm_is_exact(case: NormCase) -> None:
    """Check the total, its norm, and all gradients."""
    added, bias, residual, weight, shift, upstream, gradient = case
    dtype, hidden = added.dtype, added.shape[-1]
    total, normed, mean, scale = add_norm(added, weight, bias=bias, residual=residual, shift=shift, epsilon=EPSILON)
    sum_of_all = sum((part.double() for part in (bias, residual) if part is not None), added.double())
    _assert_close(total, sum_of_all, ERROR[dtype])
    # The norm and its gradients are those of the total as it is stored.
    exact_total = total.double().requires_grad_()
    vectors = [part.double().requires_grad_() for part in (weight, shift) if part is not None]
    if shift is None:
        exact = functional.rms_norm(exact_total, (hidden,), vectors[0], EPSILON)
    else:
        exact = functional.layer_norm(exact_total, (hidden,), *vectors, EPSILON)
    _assert_close(normed, exact.detach(), ERROR[dtype])
    if shift is not None:
        _assert_close(mean, exact_total.detach().mean(-1), 1e-6)
    deviation = exact_total.detach().var(-1, correction=0) if shift is not None else total.double().square().mean(-1)
    _assert_close(scale, (deviation + EPSILON).rsqrt(), 1e-6)
    gradients = torch.autograd.grad(exact, [exact_total, *vectors], upstream.double())
    ours, sums = add_norm_backward(
        upstream,
        total,
        weight,
        mean,
        scale,
        gradient=gradient,
        has_shift=shift is not None,
        has_bias=bias is not None,
    )
    assert ours.dtype == sums.dtype == dtype
    _assert_close(ours, gradients[0] + (0 if gradient is None else gradient.double()), ERROR[dtype])
    tokens = tuple(range(total.ndim - 1))
    expected = [*gradients[1:], *([ours.double().sum(tokens)] if bias is not None else [])]
    assert len(sums) == len(expected)
    for vector, wanted in zip(sums, expected, strict=True):
        _assert_close(vector, wanted, ERROR[dtype])


class RotaryCase(NamedTuple):
    """The product of queries, keys and values, and angles."""

    mixed: Tensor
    cos: Tensor
    sin: Tensor


def rotary_case(
    length: int,
    batch: int,
    groups: int,
    per: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> RotaryCase:
    """Return a random product [length, batch, groups, per + 2, size], and angles [length, size / 2]."""
    generator = torch.Generator().manual_seed(length + size)
    mixed = torch.randn(length, batch, groups, per + 2, size, generator=generator)
    angles = torch.randn(length, size // 2, generator=generator) * 3
    return RotaryCase(*(tensor.to(dtype).to(device) for tensor in (mixed, angles.cos(), angles.sin())))


def assert_rotation_is_exact(case: RotaryCase) -> None:
    """Check queries and keys, and the gradient of the product."""
    mixed, cos, sin = case
    length, batch, groups, members, size = mixed.shape
    exact = mixed.double().requires_grad_()
    left, right = exact[:, :, :, :-1].chunk(2, dim=-1)
    c, s = (angle.double()[:, None, None, None] for angle in (cos, sin))
    rotated = torch.cat([left * c - right * s, right * c + left * s], dim=-1)
    wanted = rotated[:, :, :, :-1].reshape(length, batch, groups * (members - 2), size), rotated[:, :, :, -1]
    query, key = split_rotated(mixed, cos, sin)
    assert query.is_contiguous()  # so that attention's output is too, in the same order
    assert key.is_contiguous()
    for ours, heads in zip((query, key), wanted, strict=True):
        assert ours.dtype == mixed.dtype
        _assert_close(ours, heads.detach(), ERROR[mixed.dtype])
    generator = torch.Generator().manual_seed(7)
    value = torch.randn(key.shape, generator=generator).to(mixed)
    upstream = [torch.randn(heads.shape, generator=generator).to(mixed) for heads in (query, key)]
    (gradient,) = torch.autograd.grad(
        [*wanted, exact[:, :, :, -1]], [exact], [part.double() for part in (*upstream, value)]
    )
    joined, sums = join_rotated(*upstream, value, cos, sin)
    assert sums.numel() == 0
    _assert_close(joined, gradient, ERROR[mixed.dtype])
    assert torch.equal(joined[:, :, :, -1], value)
    again, sums = join_rotated(*upstream, value, cos, sin, has_bias=True)
    assert torch.equal(again, joined)
    _assert_close(sums, joined.double().sum((0, 1)).flatten(), ERROR[mixed.dtype])
    joined, sums = join_rotated(*upstream, value, has_bias=True)  # heads that were not rotated are copied
    grouped = upstream[0].view(length, batch, groups, members - 2, size)
    assert torch.equal(joined, torch.cat([grouped, upstream[1][:, :, :, None], value[:, :, :, None]], dim=3))
    _assert_close(sums, joined.double().sum((0, 1)).flatten(), ERROR[mixed.dtype])


def gelu_case(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a random gradient and values [*shape], of which some are large, and a bias."""
    generator = torch.Generator().manual_seed(sum(shape))
    upstream, values, bias = (torch.randn(size, generator=generator) for size in (shape, shape, shape[-1:]))
    return upstream.to(dtype).to(device), (8 * values**3).to(dtype).to(device), bias.to(dtype).to(device)


def assert_gelu_is_exact(upstream: Tensor, values: Tensor, bias: Tensor) -> None:
    """Check the gradients of values and bias."""
    exact = values.double().requires_grad_()
    activated = functional.gelu(exact + bias.double(), approximate="tanh")
    (gradient,) = torch.autograd.grad(activated, exact, upstream.double())
    ours, sums = bias_gelu_backward(upstream, values, bias)
    assert ours.dtype == sums.dtype == values.dtype
    _assert_close(ours, gradient, ERROR[values.dtype])
    _assert_close(sums, ours.double().flatten(0, -2).sum(0), ERROR[values.dtype])


def _assert_close(ours: Tensor, exact: Tensor, error: float) -> None:
    assert ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= (error + 1e-6) * exact.abs().max()
