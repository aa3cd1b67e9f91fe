"""Attention within documents and windows, by packed sequences and by pieces, and the kernels it may use on a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from btm_scale.model import attention, packed_attention, packing
from btm_scale.model.attention import CausalAttention
from btm_scale.model.packing import Packed, first_tokens, positions_in_documents, visible
from btm_scale.model.recompute import RecomputedAttention

END = 2
LENGTH, BATCH, HEADS, KV_HEADS, SIZE = 24, 3, 4, 2, 8
BY_PIECE = ("_FlashByPiece", "_RecomputedByPiece")


def heads_of(
    device: str = "cpu", dtype: torch.dtype = torch.float32, *, size: int = SIZE, kv_heads: int = KV_HEADS
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    counts = (HEADS, kv_heads, kv_heads)
    heads = [torch.randn(LENGTH, BATCH, count, size, generator=draw, dtype=torch.float64) for count in counts]
    return [one.to(device, dtype).requires_grad_() for one in heads]


def attention_of(kind: type[CausalAttention] = CausalAttention, kv_heads: int = KV_HEADS) -> CausalAttention:
    config: Any = SimpleNamespace(num_query_groups=kv_heads, num_attention_heads=HEADS)
    return kind(config)


def documents() -> torch.Tensor:
    tokens = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    tokens[0, 6] = tokens[0, 7] = tokens[1, -1] = tokens[2, 0] = END
    return tokens


def by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, end_of_text: int | None, window: int | None
) -> torch.Tensor:
    """Attention through a mask [batch, 1, length, length]."""
    ends = documents() == END
    document = ends.cumsum(1) - ends.long() if end_of_text is not None else torch.zeros(BATCH, LENGTH)
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    if window is not None:
        mask = mask.triu(1 - window)
    heads = (one.permute(1, 2, 0, 3) for one in (query, key, value))
    attended = functional.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return attended.permute(2, 0, 1, 3).flatten(2)


def varlen_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    _: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn as its documentation defines it, one sequence after the other."""
    assert starts.dtype == torch.int32
    assert query.shape[-1] % 8 == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    bounds = starts.tolist()
    assert longest == max(end - begin for begin, end in itertools.pairwise(bounds))
    attended = []
    for begin, end in itertools.pairwise(bounds):
        mask = torch.ones(end - begin, end - begin, dtype=torch.bool).tril(window_size[1])
        if window_size[0] >= 0:
            mask = mask.triu(-window_size[0])
        parts = (heads[begin:end].transpose(0, 1) for heads in (query, key, value))
        part = functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
        attended.append(part.transpose(0, 1))
    return torch.cat(attended)


def force(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let attention run a function of `packed_attention`, or varlen as it is defined."""
    if function == "varlen":
        monkeypatch.setattr(packed_attention, "varlen_attention", lambda: varlen_by_definition)
        monkeypatch.setattr(packed_attention, "has_flash", lambda *_: True)
    else:
        monkeypatch.setattr(packed_attention, "_FlashByPiece", getattr(packed_attention, function))


@pytest.mark.parametrize("window", [None, 1, 5, LENGTH])
@pytest.mark.parametrize("end_of_text", [None, END])
@pytest.mark.parametrize("function", [*BY_PIECE, "varlen"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_attention_and_its_gradients_are_those_of_the_mask(
    end_of_text: int | None, window: int | None, function: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BLOCK", (2, 4))
    force(function, monkeypatch)
    seen = visible(documents(), end_of_text=end_of_text, window=window)
    if end_of_text is None and window in (None, LENGTH):
        assert seen is None
        return
    core = attention_of(RecomputedAttention if recomputed else CausalAttention)
    for kv_heads, size in ((HEADS, 8), (KV_HEADS, 8), (1, 7)):
        core = attention_of(type(core), kv_heads)
        ours, theirs = (heads_of(dtype=torch.float64, size=size, kv_heads=kv_heads) for _ in range(2))
        attended = core(*ours, seen)
        expected = by_definition(*theirs, end_of_text=end_of_text, window=window)
        torch.testing.assert_close(attended, expected, atol=1e-12, rtol=1e-12)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        for result in (attended, expected):
            result.backward(upstream)
        for own, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own.grad, other.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-6)])
@pytest.mark.parametrize("function", BY_PIECE)
def test_attention_by_piece_computes_in_every_dtype(
    dtype: torch.dtype, tolerance: float, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BLOCK", (2, 4))
    force(function, monkeypatch)
    ours, exact = heads_of(dtype=dtype), heads_of(dtype=torch.float64)
    attended = attention_of()(*ours, visible(documents(), end_of_text=END, window=5))
    expected = by_definition(*exact, end_of_text=END, window=5)
    assert attended.dtype == dtype
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=tolerance)
    attended.double().square().sum().backward()
    expected.square().sum().backward()
    for own, other in zip(ours, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        error = (own.grad.double() - other.grad).abs().max() / other.grad.abs().max()
        assert float(error) < tolerance


def test_heads_that_are_views_of_one_product_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a QKV projection, whose numbers per token follow one another."""
    seen = visible(documents(), end_of_text=END, window=None)
    heads = [one.detach() for one in heads_of()]
    product = torch.cat(heads, dim=2)
    views = product.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    strided = [one.transpose(2, 3).contiguous().transpose(2, 3) for one in heads]
    expected = attention_of()(*heads, seen)
    torch.testing.assert_close(attention_of()(*views, seen), expected, atol=0, rtol=0)
    torch.testing.assert_close(attention_of()(*strided, seen), expected, atol=0, rtol=0)


def test_every_token_is_a_query_of_one_piece_and_no_piece_is_larger_than_a_block_and_a_window() -> None:
    tokens = torch.zeros(2, 4000, dtype=torch.int64)
    tokens[0, 99] = tokens[0, 2999] = END
    packed = visible(tokens, end_of_text=END, window=500)
    assert packed is not None
    queries = sorted((one.row, index) for one in packed.pieces for index in range(one.queries.start, one.queries.stop))
    assert queries == [(row, index) for row in range(2) for index in range(4000)]
    assert max(one.queries.stop - one.queries.start for one in packed.pieces if one.banded) == packed.block
    assert max(one.keys.stop - one.keys.start for one in packed.pieces) == packed.block + 499
    assert packed.band.shape == (packed.block, packed.block + 499)


def test_positions_restart_with_each_document() -> None:
    tokens = torch.tensor([[5, END, 6, 7, END, END, 8], [END, 5, 6, 7, 8, 9, 5]])
    positions = positions_in_documents(first_tokens(tokens, END))
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("dtype", "separate"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)])
def test_without_flash_a_gpu_gets_no_kernel_that_holds_all_scores(
    dtype: torch.dtype, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on older cards, or with a PyTorch whose attention over packed sequences knows no windows."""
    calls: list[dict[str, Any]] = []

    def recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        calls.append({"key": key, "value": value, "kernels": _cur_sdpa_kernel_backends(), **named})
        return query

    for module in (attention, packed_attention):
        monkeypatch.setattr(module.functional, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(packed_attention, "varlen_attention", lambda: None)
    starts = torch.tensor([0, 6, LENGTH, 2 * LENGTH, 3 * LENGTH], dtype=torch.int32)
    seen = Packed(starts, LENGTH, LENGTH, window=18) if separate else None
    attention_of()(*heads_of("meta", dtype), seen)
    assert len(calls) == (6 if separate else 1)
    for call in calls:
        # Of the kernels with linear memory only flash takes grouped heads, and it takes neither masks nor float32.
        assert call["key"].shape[1] == call["value"].shape[1] == HEADS
        assert not call.get("enable_gqa")
        if separate:
            assert set(call["kernels"]) <= {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION}


def test_a_repeated_head_is_the_head_of_its_group() -> None:
    query, key, value = heads_of()
    grouped = attention_of()(query, key, value)
    repeats = HEADS // KV_HEADS
    repeated = (heads.repeat_interleave(repeats, dim=2) for heads in (key, value))
    torch.testing.assert_close(attention_of(kv_heads=HEADS)(query, *repeated), grouped)
