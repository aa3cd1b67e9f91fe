"""Attention within the sequences of a packed batch, with memory linear in its length.

PyTorch's flash kernel for GPUs takes packed sequences. Elsewhere each piece of a batch is a call of a kernel.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from btm_scale.model.packing import Packed, Piece, has_flash, varlen_attention

# For grouped heads or masks on a GPU. The remaining one, `math`, would hold the scores of every head.
LINEAR_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_ALIGNED = 8  # the flash kernel's head sizes are multiples of it


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    """Attend within packed sequences: query [length, batch, heads, d], key and value [length, batch, KV heads, d] ->
    [length, batch, heads * d]."""
    if varlen_attention() is not None and has_flash(query.device, query.dtype, _aligned(query.shape[-1])):
        return _attend_varlen(query, key, value, packed)
    by_piece = _FlashByPiece if query.device.type == "cpu" else _RecomputedByPiece
    # The kernels step through memory by head, and read the numbers of a head as they follow one another.
    heads = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
    attended: Tensor = by_piece.apply(*heads, packed)
    return attended.flatten(2)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
    length, batch, _, size = query.shape
    attend = varlen_attention()
    assert attend is not None
    # PyTorch pads heads only in scaled_dot_product_attention.
    padding = _aligned(size) - size
    heads = (functional.pad(one, (0, padding)) if padding else one for one in (query, key, value))
    attended = attend(
        *(one.transpose(0, 1).reshape(batch * length, *one.shape[2:]) for one in heads),
        packed.starts,
        packed.starts,
        packed.longest,
        packed.longest,
        scale=size**-0.5,
        window_size=(-1 if packed.window is None else packed.window - 1, 0),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    attended = attended[..., :size].reshape(batch, length, -1)
    return attended.transpose(0, 1).contiguous()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _of(piece: Piece, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a piece's queries, keys and values as the kernels take them, [1, heads, tokens, d]."""
    queries, keys = (query[piece.queries, piece.row], (key[piece.keys, piece.row], value[piece.keys, piece.row]))
    key, value = (one.transpose(0, 1)[None] for one in keys)
    return queries.transpose(0, 1)[None], key, value


def _add(piece: Piece, gradients: tuple[Tensor, ...], sums: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add a piece's gradients to those of all queries, keys and values."""
    tokens = (piece.queries, piece.keys, piece.keys)
    for gradient, total, rows in zip(gradients, sums, tokens, strict=True):
        total[rows, piece.row] += gradient[0].transpose(0, 1)


class _FlashByPiece(torch.autograd.Function):
    """query, key, value, Packed -> attended [length, batch, heads, d], by the flash kernel for CPUs.

    It is called through its operators, because scaled_dot_product_attention would leave a copy of every piece.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        attended = torch.empty(query.shape, dtype=query.dtype)
        wide = torch.promote_types(query.dtype, torch.float32)
        log_sums = torch.empty(*query.shape[1::-1], query.shape[2], dtype=wide)  # [batch, length, heads]
        mask = _additive(packed, query.dtype)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for piece in packed.pieces:
            part, sums = attend(*_of(piece, query, key, value), 0.0, not piece.banded, attn_mask=_part(mask, piece))
            attended[piece.queries, piece.row] = part[0].transpose(0, 1)
            log_sums[piece.row, piece.queries] = sums[0].transpose(0, 1)
        ctx.save_for_backward(query, key, value, attended, log_sums)
        ctx.packed = packed
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attended, log_sums = ctx.saved_tensors
        packed, upstream = ctx.packed, gradients[0].contiguous()
        sums = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        mask = _additive(packed, query.dtype)
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for piece in packed.pieces:
            above, output = (one[piece.queries, piece.row].transpose(0, 1)[None] for one in (upstream, attended))
            own_sums = log_sums[piece.row, piece.queries].transpose(0, 1)[None]
            heads = _of(piece, query, key, value)
            named = {"attn_mask": _part(mask, piece)}
            _add(piece, attend(above, *heads, output, own_sums, 0.0, not piece.banded, **named), sums)
        return *sums, None


class _RecomputedByPiece(torch.autograd.Function):
    """query, key, value, Packed -> attended [length, batch, heads, d], on a GPU without the flash kernel.

    The backward pass attends again, piece by piece, so that autograd holds the tensors of one piece at a time.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        attended = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for piece in packed.pieces:
            part = _attend(*_of(piece, query, key, value), packed=packed, piece=piece)
            attended[piece.queries, piece.row] = part[0].transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.packed = packed
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        sums = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for piece in ctx.packed.pieces:
            with torch.enable_grad():
                heads = tuple(one.detach().requires_grad_() for one in _of(piece, query, key, value))
                part = _attend(*heads, packed=ctx.packed, piece=piece)
            above = gradients[0][piece.queries, piece.row].transpose(0, 1)[None]
            _add(piece, torch.autograd.grad(part, heads, above), sums)
        return *sums, None


def _attend(query: Tensor, key: Tensor, value: Tensor, *, packed: Packed, piece: Piece) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # only flash takes grouped heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    mask = _part(packed.band, piece) if piece.banded else None
    with sdpa_kernel(LINEAR_KERNELS) if query.device.type != "cpu" else contextlib.nullcontext():
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


def _additive(packed: Packed, dtype: torch.dtype) -> Tensor | None:
    """Return 0 where a query of a piece attends to a key, and -inf elsewhere; None if no piece is banded."""
    if packed.window is None or packed.longest <= packed.window:
        return None
    return torch.zeros(packed.band.shape, dtype=dtype).masked_fill_(~packed.band, -torch.inf)


def _part(mask: Tensor | None, piece: Piece) -> Tensor | None:
    if mask is None or not piece.banded:
        return None
    return mask[: piece.queries.stop - piece.queries.start, : piece.keys.stop - piece.keys.start]
