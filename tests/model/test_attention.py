"""Attention within documents and windows, by packed sequences and by masks, and the kernels it may use on a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from btm_scale.model import attention, packing
from btm_scale.model.attention import CausalAttention
from btm_scale.model.packing import packs_sequences, visible

END = 2
LENGTH, BATCH, HEADS, KV_HEADS, SIZE = 24, 3, 4, 2, 8


def heads_of(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    counts = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(LENGTH, BATCH, count, SIZE, generator=draw).to(device, dtype) for count in counts]


def grouped_attention() -> CausalAttention:
    config: Any = SimpleNamespace(num_query_groups=KV_HEADS, num_attention_heads=HEADS)
    return CausalAttention(config)


def varlen_by_definition(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    _: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """torch.nn.attention.varlen.varlen_attn as its documentation defines it, one sequence after the other."""
    assert starts.dtype == torch.int32
    assert enable_gqa
    bounds = starts.tolist()
    attended = []
    for begin, end in itertools.pairwise(bounds):
        assert end - begin <= longest
        mask = torch.ones(end - begin, end - begin, dtype=torch.bool).tril(window_size[1])
        if window_size[0] >= 0:
            mask = mask.triu(-window_size[0])
        parts = (heads[begin:end].transpose(0, 1) for heads in (query, key, value))
        attended.append(
            functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(0, 1)
        )
    return torch.cat(attended)


@pytest.mark.parametrize("window", [None, 5, LENGTH])
@pytest.mark.parametrize("end_of_text", [None, END])
def test_packed_sequences_attend_to_what_the_mask_allows(
    end_of_text: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    tokens[0, 6] = tokens[0, 7] = tokens[1, -1] = tokens[2, 0] = END
    monkeypatch.setattr(attention, "varlen_attention", lambda: varlen_by_definition)
    by = {packs: visible(tokens, end_of_text=end_of_text, window=window, packs=packs) for packs in (False, True)}
    if end_of_text is None and window in (None, LENGTH):
        assert by == {False: None, True: None}
        return
    masked, packed = (grouped_attention()(*heads_of(), by[packs]) for packs in (False, True))
    torch.testing.assert_close(packed, masked)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, True), (torch.float32, True), (torch.float32, False)])
def test_without_flash_a_gpu_gets_no_kernel_that_holds_all_scores(
    dtype: torch.dtype, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on older cards, or with a PyTorch whose attention over packed sequences knows no windows."""
    calls: list[dict[str, Any]] = []

    def recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **named: Any) -> torch.Tensor:
        calls.append({"key": key, "value": value, "kernels": _cur_sdpa_kernel_backends(), **named})
        return query

    monkeypatch.setattr(attention.functional, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(packing, "varlen_attention", lambda: None)
    assert not packs_sequences(torch.device("meta"), dtype, SIZE)
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="meta")
    mask = visible(tokens, end_of_text=END if masked else None, window=None, packs=False)
    grouped_attention()(*heads_of("meta", dtype), mask)
    [call] = calls
    # Of the kernels without quadratic memory only flash takes grouped heads, and it takes neither masks nor float32.
    assert call["key"].shape[1] == call["value"].shape[1] == HEADS
    assert not call["enable_gqa"]
    if masked:
        assert set(call["kernels"]) <= {SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION}


def test_a_repeated_head_is_the_head_of_its_group() -> None:
    query, key, value = heads_of()
    grouped = grouped_attention()(query, key, value)
    config: Any = SimpleNamespace(num_query_groups=HEADS, num_attention_heads=HEADS)
    repeats = HEADS // KV_HEADS
    repeated = (heads.repeat_interleave(repeats, dim=2) for heads in (key, value))
    torch.testing.assert_close(CausalAttention(config)(query, *repeated), grouped)
