"""Launches, bytes read and bytes written of a layer's operators, each by the arguments of its schema."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from btm_scale.kernels.hardware import Hardware, hardware
from btm_scale.kernels.layer_tuning import gelu_configs, norm_configs, rotary_configs

_FLOAT = 4
Launches = tuple[int, int, int]


def _add_norm(
    on: Hardware | None,
    added: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    *_: object,
) -> Launches:
    statistics = added.numel() // added.shape[-1] * _FLOAT * (1 if shift is None else 2)
    rows = 1 if bias is None and residual is None else 2
    return 1, _bytes(added, bias, residual, weight, shift), rows * _bytes(added) + statistics


def _add_norm_backward(
    on: Hardware | None,
    gradient: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    has_shift: bool,
    has_bias: bool,
) -> Launches:
    hidden = total.shape[-1]
    configs = norm_configs(on or hardware(total.device), hidden)
    programs = min(scale.numel(), configs[0].programs if configs else scale.numel())
    kinds = 1 + has_shift + has_bias
    sums = kinds * programs * hidden * _FLOAT
    read = _bytes(gradient, upstream, total, weight, mean, scale)
    return 2, read + sums, _bytes(total) + sums + kinds * _bytes(weight)


def _split_rotated(on: Hardware | None, mixed: Tensor, cos: Tensor, sin: Tensor) -> Launches:
    members = mixed.shape[3]
    rotated = _bytes(mixed) * (members - 1) // members  # values stay where they are
    return 1, rotated + _bytes(cos, sin), rotated


def _join_rotated(
    on: Hardware | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    has_bias: bool,
) -> Launches:
    heads = _bytes(query, key, value)
    if not has_bias:
        return 1, heads + _bytes(cos, sin), heads
    tokens = key.shape[0] * key.shape[1]
    programs = min(tokens, rotary_configs(on or hardware(key.device), key.shape[-1])[0].programs)
    width = heads // key.element_size() // tokens
    sums = programs * width * _FLOAT
    return 2, heads + _bytes(cos, sin) + sums, heads + sums + width * key.element_size()


def _bias_gelu_backward(on: Hardware | None, upstream: Tensor, values: Tensor, bias: Tensor) -> Launches:
    programs = min(values.numel() // len(bias), gelu_configs(on or hardware(values.device))[0].programs)
    sums = programs * len(bias) * _FLOAT
    return 2, _bytes(upstream, values, bias) + sums, _bytes(values) + sums + _bytes(bias)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


LAYER_COSTS: dict[str, Callable[..., Launches]] = {
    "add_norm": _add_norm,
    "add_norm_backward": _add_norm_backward,
    "split_rotated": _split_rotated,
    "join_rotated": _join_rotated,
    "bias_gelu_backward": _bias_gelu_backward,
}
