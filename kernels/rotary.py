"""Triton kernels: split the output of the QKV projection and apply rotary embeddings, and the gradients of that.

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
    sums_ptr,
    rows,
    batch,
    groups,
    half,
    PER: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate queries and keys back, left, right -> left cos + right sin, right cos - left sin, and copy values.

    HEADS heads of `mixed`, given queries [tokens, KV heads, PER, d], keys and values [tokens, KV heads, d]. Without
    `cos_ptr` nothing is rotated. Program p of n computes tokens p, p + n, p + 2n, ... of `rows`, and writes its sums
    over them to sums [programs, KV heads, PER + 2, d], if there are sums.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    mask = (head < groups * (PER + 2))[:, None] & (column < half)[None, :]
    group, member = head // (PER + 2), head % (PER + 2)
    is_query = mask & (member < PER)[:, None]
    is_key = mask & (member == PER)[:, None]
    is_value = mask & (member == PER + 1)[:, None]
    in_query = ((group * PER + member) * 2 * half)[:, None] + column[None, :]
    in_key = (group * 2 * half)[:, None] + column[None, :]
    in_mixed = (head * 2 * half)[:, None] + column[None, :]
    first_sum = tl.zeros((HEADS, HALF), tl.float32)
    second_sum = tl.zeros((HEADS, HALF), tl.float32)
    token = program.to(tl.int64) * groups * 2 * half
    step = programs.to(tl.int64) * groups * 2 * half
    for row in range(program, rows, programs):
        query = query_ptr + token * PER + in_query
        left = tl.load(query, mask=is_query, other=0.0).to(tl.float32)
        right = tl.load(query + half, mask=is_query, other=0.0).to(tl.float32)
        key = key_ptr + token + in_key
        left += tl.load(key, mask=is_key, other=0.0).to(tl.float32)
        right += tl.load(key + half, mask=is_key, other=0.0).to(tl.float32)
        if cos_ptr is not None:
            angle = (row // batch) * half + column
            cos = tl.load(cos_ptr + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
            sin = tl.load(sin_ptr + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
            left, right = left * cos + right * sin, right * cos - left * sin
        value = value_ptr + token + in_key
        left += tl.load(value, mask=is_value, other=0.0).to(tl.float32)
        right += tl.load(value + half, mask=is_value, other=0.0).to(tl.float32)
        first, second = left.to(mixed_ptr.dtype.element_ty), right.to(mixed_ptr.dtype.element_ty)
        mixed = mixed_ptr + token * (PER + 2) + in_mixed
        tl.store(mixed, first, mask=mask)
        tl.store(mixed + half, second, mask=mask)
        token += step
        if sums_ptr is not None:
            first_sum += first.to(tl.float32)
            second_sum += second.to(tl.float32)
    if sums_ptr is not None:
        sums = sums_ptr + program * groups * (PER + 2) * 2 * half + in_mixed
        tl.store(sums, first_sum, mask=mask)
        tl.store(sums + half, second_sum, mask=mask)
