"""Launch the Triton kernels of a layer, on the current device and its current stream. Tensors must be contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from btm_scale.kernels.gelu import bias_gelu_backward_kernel
from btm_scale.kernels.layer_reference import Normed
from btm_scale.kernels.layer_tuning import ColumnsConfig, RotaryConfig
from btm_scale.kernels.norm import add_norm_backward_kernel, add_norm_kernel, column_sums_kernel
from btm_scale.kernels.pieces import ceil_div
from btm_scale.kernels.rotary import join_rotated_kernel, split_rotated_kernel

_SUM_ROWS, _SUM_COLUMNS = 64, 32


def add_norm(
    added: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    shift: Tensor | None,
    epsilon: float,
    *,
    config: ColumnsConfig,
) -> Normed:
    """See `layer_reference.add_norm`."""
    changed = bias is not None or residual is not None
    total = torch.empty_like(added) if changed else None
    normed = torch.empty_like(added)
    scale = torch.empty(added.shape[:-1], device=added.device)
    mean = None if shift is None else torch.empty_like(scale)
    add_norm_kernel[(scale.numel(),)](
        added,
        bias,
        residual,
        weight,
        shift,
        total,
        normed,
        mean,
        scale,
        added.shape[-1],
        epsilon,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    nothing = added.new_empty(0), scale.new_empty(0)
    return nothing[0] if total is None else total, normed, nothing[1] if mean is None else mean, scale


def add_norm_backward(
    gradient: Tensor | None,
    upstream: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    has_shift: bool,
    has_bias: bool,
    *,
    config: ColumnsConfig,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.add_norm_backward`."""
    rows, hidden = scale.numel(), total.shape[-1]
    kinds, programs = 1 + has_shift + has_bias, min(rows, config.programs)
    result = torch.empty_like(total)
    sums = torch.empty(kinds, programs, hidden, device=total.device)
    add_norm_backward_kernel[(programs,)](
        gradient,
        upstream,
        total,
        weight,
        mean if has_shift else None,
        scale,
        result,
        sums,
        rows,
        hidden,
        HAS_BIAS=has_bias,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return result, _column_sums(sums, weight.dtype)


def _column_sums(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums of [kinds, programs, columns] over the programs, in their order."""
    kinds, programs, columns = sums.shape
    vectors = torch.empty(kinds, columns, dtype=dtype, device=sums.device)
    column_sums_kernel[(ceil_div(columns, _SUM_COLUMNS), kinds)](
        sums, vectors, programs, columns, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=4
    )
    return vectors


def bias_gelu_backward(
    upstream: Tensor, values: Tensor, bias: Tensor, *, config: ColumnsConfig
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.bias_gelu_backward`."""
    width = len(bias)
    rows = values.numel() // width
    programs = min(rows, config.programs)
    result = torch.empty_like(values)
    sums = torch.empty(1, programs, width, device=values.device)
    bias_gelu_backward_kernel[(programs, ceil_div(width, config.block))](
        upstream, values, bias, result, sums, rows, width, BLOCK=config.block, num_warps=config.warps
    )
    return result, _column_sums(sums, bias.dtype)[0]


def split_rotated(mixed: Tensor, cos: Tensor, sin: Tensor, *, config: RotaryConfig) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.split_rotated`."""
    length, batch, groups, members, size = mixed.shape
    per = members - 2
    query = torch.empty(length, batch, groups * per, size, dtype=mixed.dtype, device=mixed.device)
    key = torch.empty(length, batch, groups, size, dtype=mixed.dtype, device=mixed.device)
    split_rotated_kernel[(length * batch, ceil_div(groups * (per + 1), config.heads))](
        mixed,
        cos,
        sin,
        query,
        key,
        batch,
        groups,
        size // 2,
        PER=per,
        HEADS=config.heads,
        HALF=config.half,
        num_warps=config.warps,
    )
    return query, key


def join_rotated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    has_bias: bool,
    *,
    config: RotaryConfig,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.join_rotated`."""
    length, batch, groups, size = key.shape
    per, rows = query.shape[2] // groups, length * batch
    heads = groups * (per + 2)
    mixed = torch.empty(length, batch, groups, per + 2, size, dtype=key.dtype, device=key.device)
    programs = min(rows, config.programs) if has_bias else rows
    sums = torch.empty(1, programs, heads * size, device=key.device) if has_bias else None
    join_rotated_kernel[(programs, ceil_div(heads, config.heads))](
        query,
        key,
        value,
        cos,
        sin,
        mixed,
        sums,
        rows,
        batch,
        groups,
        size // 2,
        PER=per,
        HEADS=config.heads,
        HALF=config.half,
        num_warps=config.warps,
    )
    return mixed, key.new_empty(0) if sums is None else _column_sums(sums, key.dtype)[0]
