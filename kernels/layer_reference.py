"""PyTorch reference of a layer's kernels. Computes in float32 between inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

Normed = tuple[Tensor, Tensor, Tensor, Tensor]


def add_norm(
    added: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    epsilon: float,
) -> Normed:
    """See `btm_scale.kernels.add_norm`. The total is empty without bias and residual."""
    total = added.float()
    if bias is not None:
        total = total + bias
    if residual is not None:
        total = total + residual
    stored = total.to(added.dtype).contiguous() if bias is not None or residual is not None else added.new_empty(0)
    values = stored.float() if stored.numel() else total
    mean = values.new_empty(0)
    if shift is not None:
        mean = values.mean(-1)
        values = values - mean[..., None]
    scale = torch.rsqrt((values * values).mean(-1) + epsilon)
    normed = values * scale[..., None] * weight
    if shift is not None:
        normed = normed + shift
    return stored, normed.to(added.dtype).contiguous(), mean.contiguous(), scale.contiguous()


def add_norm_backward(
    gradient: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    has_shift: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.add_norm_backward`."""
    values, outer, scale = total.float(), upstream.float(), scale[..., None]
    unit = (values - mean[..., None] if has_shift else values) * scale
    weighted = outer * weight
    inner = weighted - unit * (weighted * unit).mean(-1, keepdim=True)
    if has_shift:
        inner = inner - weighted.mean(-1, keepdim=True)
    inner = inner * scale
    if gradient is not None:
        inner = inner + gradient
    result = inner.to(total.dtype).contiguous()
    tokens = tuple(range(total.ndim - 1))
    sums = [(outer * unit).sum(tokens)]
    if has_shift:
        sums.append(outer.sum(tokens))
    if has_bias:
        sums.append(result.float().sum(tokens))
    return result, torch.stack(sums).to(weight.dtype)


def split_rotated(mixed: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.split_rotated`."""
    rotated = _rotated(mixed[:, :, :, :-1], cos, sin)
    query, key = rotated[:, :, :, :-1], rotated[:, :, :, -1]
    return query.reshape(*query.shape[:2], -1, query.shape[-1]).contiguous(), key.contiguous()


def join_rotated(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.join_rotated`. The gradient of the bias is empty without one."""
    grouped = query.reshape(*key.shape[:3], -1, key.shape[3])
    heads = torch.cat([grouped, key[:, :, :, None]], dim=3)
    back = heads if cos is None or sin is None else _rotated(heads, cos, -sin)
    mixed = torch.cat([back, value[:, :, :, None]], dim=3)
    sums = mixed.float().sum((0, 1)).flatten() if has_bias else mixed.new_empty(0)
    return mixed, sums.to(mixed.dtype)


def bias_gelu_backward(upstream: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.bias_gelu_backward`."""
    x = values.float() + bias
    gelu = torch.ops.aten.gelu_backward(upstream.float(), x, approximate="tanh")
    result = gelu.to(values.dtype).contiguous()
    return result, result.float().flatten(0, -2).sum(0).to(bias.dtype)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [length, batch, ..., d] by angles [length, d / 2]."""
    left, right = heads.float().chunk(2, dim=-1)
    shape = (len(heads), *[1] * (heads.ndim - 2), -1)
    cos, sin = cos.float().view(shape), sin.float().view(shape)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(heads.dtype)
