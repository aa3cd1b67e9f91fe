"""Fused elementwise operations of a layer, as public functions and as PyTorch operators."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from btm_scale.kernels import layer_reference as reference
from btm_scale.kernels import operators, paths
from btm_scale.kernels.checks import check_bias, check_join, check_norm, check_norm_backward, check_rotation
from btm_scale.kernels.hardware import Hardware
from btm_scale.kernels.layer_reference import Normed
from btm_scale.kernels.layer_tuning import gelu_configs, norm_configs, rotary_configs
from btm_scale.kernels.paths import Config


@torch.no_grad()
def add_norm(
    added: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shift: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Normed:
    """Add a bias and a residual connection, and return the total, its norm, and the norm's statistics.

    total = added + bias + residual, rounded to the dtype of `added`; normed = (total - mean) scale weight + shift, with
    scale = 1 / sqrt(mean((total - mean)^2) + epsilon): layer norm. Without `shift` the mean is left out: RMS norm.

    Args:
        added: [..., hidden], bfloat16, float16 or float32.
        weight: [hidden].
        bias: [hidden].
        residual: like `added`.
        shift: [hidden].
        epsilon: added to the variance.

    Returns:
        total and normed, like `added`; float32 mean, empty for RMS norm, and scale, [...]. Without bias and residual
        the total is `added` itself.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_norm(added, weight, bias, residual, shift)
    total, normed, mean, scale = ADD_NORM(added, bias, residual, weight, shift, epsilon)
    return added if bias is None and residual is None else total, normed, mean, scale


@torch.no_grad()
def add_norm_backward(
    upstream: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    *,
    gradient: Tensor | None = None,
    has_shift: bool = False,
    has_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `add_norm`'s inputs, given those of its outputs.

    Args:
        upstream: gradient of normed, [..., hidden].
        total: as `add_norm` returns it.
        weight: as for `add_norm`.
        mean: as `add_norm` returns it.
        scale: as `add_norm` returns it.
        gradient: gradient of the total that does not come through the norm, [..., hidden].
        has_shift: whether there was a shift.
        has_bias: whether there was a bias.

    Returns:
        The gradient of the total, [..., hidden], which is also that of `added` and the residual; and the gradients of
        weight, and of shift and bias if they exist, [1 to 3, hidden], summed in float32 in a fixed order.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_norm_backward(upstream, total, weight, mean if has_shift else None, scale, gradient)
    arguments = gradient, upstream, total, weight, mean, scale, has_shift, has_bias
    result: tuple[Tensor, Tensor] = ADD_NORM_BACKWARD(*arguments)
    return result


@torch.no_grad()
def split_rotated(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Apply rotary embeddings; return queries [length, batch, heads, d] and keys [length, batch, KV heads, d].

    The halves of a head, left and right, become left cos - right sin and right cos + left sin.

    Args:
        mixed: [length, batch, KV heads, heads per KV head + 2, d], the output of the QKV projection.
        cos: [length, d / 2].
        sin: [length, d / 2].

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_rotation(mixed, cos, sin)
    heads: tuple[Tensor, Tensor] = SPLIT_ROTATED(mixed, cos, sin)
    return heads


@torch.no_grad()
def join_rotated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    has_bias: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the QKV projection's output and bias, given those of queries, keys and values.

    Args:
        query: gradient of the queries, [length, batch, heads, d] with even d.
        key: gradient of the keys, [length, batch, KV heads, d].
        value: gradient of the values, like `key`.
        cos: [length, d / 2], as for `split_rotated`. Default: heads were not rotated.
        sin: [length, d / 2].
        has_bias: whether there was a bias.

    Returns:
        [length, batch, KV heads, heads per KV head + 2, d]; and its sum over length and batch, flattened, in float32 in
        a fixed order, or an empty tensor without a bias.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_join(query, key, value, cos, sin)
    gradients: tuple[Tensor, Tensor] = JOIN_ROTATED(query, key, value, cos, sin, has_bias)
    return gradients


@torch.no_grad()
def bias_gelu_backward(upstream: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `values` and `bias`, given that of gelu(values + bias) with its approximation by tanh.

    Args:
        upstream: [..., width], bfloat16, float16 or float32.
        values: like `upstream`.
        bias: [width].

    Returns:
        [..., width]; and its sum over all other dimensions, [width], in float32 in a fixed order.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_bias(upstream, values, bias)
    gradients: tuple[Tensor, Tensor] = BIAS_GELU_BACKWARD(upstream, values, bias)
    return gradients


def _run_add_norm(
    added: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, shift: Tensor | None, epsilon: float
) -> Normed:
    arguments = added, bias, residual, weight, shift, epsilon
    normed: Normed = _run("add_norm", added, lambda gpu: norm_configs(gpu, added.shape[-1]), arguments)
    return normed


def _run_add_norm_backward(
    gradient: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    has_shift: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    arguments = gradient, upstream, total, weight, mean, scale, has_shift, has_bias
    return _run("add_norm_backward", total, lambda gpu: norm_configs(gpu, total.shape[-1]), arguments)


def _run_split_rotated(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _run("split_rotated", mixed, lambda gpu: rotary_configs(gpu, mixed.shape[-1]), (mixed, cos, sin))


def _run_join_rotated(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, has_bias: bool
) -> tuple[Tensor, Tensor]:
    arguments = query, key, value, cos, sin, has_bias
    return _run("join_rotated", key, lambda gpu: rotary_configs(gpu, key.shape[-1]), arguments)


def _run_bias_gelu_backward(upstream: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _run("bias_gelu_backward", values, gelu_configs, (upstream, values, bias))


def _run(name: str, tensor: Tensor, configs: Callable[[Hardware], list[Config]], arguments: tuple[object, ...]) -> Any:
    """Run the Triton kernel, or the PyTorch reference where it cannot run: functions with the operator's name."""

    def plain() -> Any:
        return getattr(reference, name)(*arguments)

    if tensor.numel() == 0 or operators.triton_module(tensor) is None:
        return paths.run_reference(name, plain)
    launch = getattr(importlib.import_module("btm_scale.kernels.layer_launch"), name)
    given = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]
    return paths.run(name, tensor, configs, lambda config: launch(*given, config=config), plain)


def _fake_add_norm(
    added: Tensor, bias: Tensor | None, residual: Tensor | None, weight: Tensor, shift: Tensor | None, *_: object
) -> Normed:
    scale = added.new_empty(added.shape[:-1], dtype=torch.float32)
    changed = bias is not None or residual is not None
    mean = scale.new_empty(0) if shift is None else torch.empty_like(scale)
    return added.new_empty(added.shape if changed else 0), added.new_empty(added.shape), mean, scale


def _fake_add_norm_backward(
    gradient: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    has_shift: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    kinds = 1 + has_shift + has_bias
    return total.new_empty(total.shape), weight.new_empty(kinds, total.shape[-1])


def _fake_split_rotated(mixed: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    length, batch, groups, members, size = mixed.shape
    query = mixed.new_empty(length, batch, groups * (members - 2), size)
    return query, mixed.new_empty(length, batch, groups, size)


def _fake_join_rotated(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, has_bias: bool
) -> tuple[Tensor, Tensor]:
    length, batch, groups, size = key.shape
    members = query.shape[2] // groups + 2
    return key.new_empty(length, batch, groups, members, size), key.new_empty(groups * members * size * has_bias)


def _fake_bias_gelu_backward(upstream: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), bias.new_empty(bias.shape)


ADD_NORM = operators.define(
    "add_norm",
    "(Tensor added, Tensor? bias, Tensor? residual, Tensor weight, Tensor? shift, float epsilon)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_add_norm,
    _fake_add_norm,
)
ADD_NORM_BACKWARD = operators.define(
    "add_norm_backward",
    "(Tensor? gradient, Tensor upstream, Tensor total, Tensor weight, Tensor mean, Tensor scale, bool has_shift,"
    " bool has_bias) -> (Tensor, Tensor)",
    _run_add_norm_backward,
    _fake_add_norm_backward,
)
SPLIT_ROTATED = operators.define(
    "split_rotated",
    "(Tensor mixed, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    _run_split_rotated,
    _fake_split_rotated,
)
JOIN_ROTATED = operators.define(
    "join_rotated",
    "(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, bool has_bias) -> (Tensor, Tensor)",
    _run_join_rotated,
    _fake_join_rotated,
)
BIAS_GELU_BACKWARD = operators.define(
    "bias_gelu_backward",
    "(Tensor upstream, Tensor values, Tensor bias) -> (Tensor, Tensor)",
    _run_bias_gelu_backward,
    _fake_bias_gelu_backward,
)
# By name, for tests with stub GPUs, which PyTorch's dispatcher does not know.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "add_norm": _run_add_norm,
    "add_norm_backward": _run_add_norm_backward,
    "split_rotated": _run_split_rotated,
    "join_rotated": _run_join_rotated,
    "bias_gelu_backward": _run_bias_gelu_backward,
}
