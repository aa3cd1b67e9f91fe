"""Triton kernels: split the output of the QKV projection and apply rotary embeddings, and the gradient of that.

The output is [tokens, KV heads, PER + 2, d]: the PER query heads of a KV head, its key and its value. A head has its
two halves at a distance of d / 2, and cosines and sines are [positions, d / 2].
"""

# ruff: noqa: N803 - Triton code capitalizes compile-time constants
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_rotated_kernel(
    mixed_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    key_ptr,
    batch,
    groups,
    half,
    PER: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """left, right -> left cos - right sin, right cos + left sin, of HEADS heads of a token. Values are not read."""
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    mask = (head < groups * (PER + 1))[:, None] & (column < half)[None, :]
    group, member = head // (PER + 1), head % (PER + 1)
    angle = (row // batch) * half + column
    cos = tl.load(cos_ptr + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    token = row.to(tl.int64) * groups
    source = mixed_ptr + token * (PER + 2) * 2 * half + ((group * (PER + 2) + member) * 2 * half)[:, None]
    left = tl.load(source + column[None, :], mask=mask, other=0.0).to(tl.float32)
    right = tl.load(source + half + column[None, :], mask=mask, other=0.0).to(tl.float32)
    first = (left * cos - right * sin).to(query_ptr.dtype.element_ty)
    second = (right * cos + left * sin).to(query_ptr.dtype.element_ty)
    is_query = mask & (member < PER)[:, None]
    query = query_ptr + token * PER * 2 * half + ((group * PER + member) * 2 * half)[:, None] + column[None, :]
    tl.store(query, first, mask=is_query)
    tl.store(query + half, second, mask=is_query)
    is_key = mask & (member == PER)[:, None]
    key = key_ptr + token * 2 * half + (group * 2 * half)[:, None] + column[None, :]
    tl.store(key, first, mask=is_key)
    tl.store(key + half, second, mask=is_key)


@triton.jit
def join_rotated_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    mixed_ptr,
    batch,
    groups,
    half,
    PER: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate queries and keys back, left, right -> left cos + right sin, right cos - left sin, and copy values.

    HEADS heads of a token of `mixed`, given queries [tokens, KV heads, PER, d], keys and values [tokens, KV heads, d].
    """
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    mask = (head < groups * (PER + 2))[:, None] & (column < half)[None, :]
    group, member = head // (PER + 2), head % (PER + 2)
    angle = (row // batch) * half + column
    cos = tl.load(cos_ptr + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    token = row.to(tl.int64) * groups
    at = (group * 2 * half)[:, None] + column[None, :]
    query = query_ptr + token * PER * 2 * half + ((group * PER + member) * 2 * half)[:, None] + column[None, :]
    is_query = mask & (member < PER)[:, None]
    left = tl.load(query, mask=is_query, other=0.0).to(tl.float32)
    right = tl.load(query + half, mask=is_query, other=0.0).to(tl.float32)
    key = key_ptr + token * 2 * half + at
    is_key = mask & (member == PER)[:, None]
    left += tl.load(key, mask=is_key, other=0.0).to(tl.float32)
    right += tl.load(key + half, mask=is_key, other=0.0).to(tl.float32)
    value = value_ptr + token * 2 * half + at
    is_value = mask & (member == PER + 1)[:, None]
    first = left * cos + right * sin + tl.load(value, mask=is_value, other=0.0).to(tl.float32)
    second = right * cos - left * sin + tl.load(value + half, mask=is_value, other=0.0).to(tl.float32)
    mixed = mixed_ptr + token * (PER + 2) * 2 * half + ((group * (PER + 2) + member) * 2 * half)[:, None]
    tl.store(mixed + column[None, :], first.to(mixed_ptr.dtype.element_ty), mask=mask)
    tl.store(mixed + half + column[None, :], second.to(mixed_ptr.dtype.element_ty), mask=mask)
