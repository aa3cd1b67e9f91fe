"""Attention within packed documents on a GPU, beside a mask in float64, by every kernel that it may select."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from btm_scale.model.packed_attention import attend_packed
from btm_scale.model.packing import first_tokens, visible

END, LENGTH, BATCH, HEADS = 2, 700, 2, 8
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def documents(device: torch.device) -> torch.Tensor:
    tokens = torch.full((BATCH, LENGTH), 5, device=device)
    tokens[0, 129] = tokens[0, 130] = tokens[1, 600] = END
    return tokens


def exact(heads: list[torch.Tensor], tokens: torch.Tensor, window: int | None) -> torch.Tensor:
    document = first_tokens(tokens, END).cumsum(1)
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    mask = mask if window is None else mask.triu(1 - window)
    query, key, value = (one.permute(1, 2, 0, 3) for one in heads)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return functional.softmax(scores, dim=-1).matmul(value).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("kv_heads", "size"), [(8, 64), (2, 128), (1, 60)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_attention_and_its_gradients_are_those_of_the_mask(
    device: torch.device, dtype: torch.dtype, kv_heads: int, size: int, window: int | None
) -> None:
    torch.manual_seed(1)
    tokens = documents(device)
    heads = [torch.randn(LENGTH, BATCH, count, size, device=device).to(dtype) for count in (HEADS, kv_heads, kv_heads)]
    ours = [one.clone().requires_grad_() for one in heads]
    theirs = [one.double().requires_grad_() for one in heads]
    seen = visible(tokens, end_of_text=END, window=window)
    assert seen is not None
    with torch.cuda.device(device):
        attended = attend_packed(*ours, seen)
        expected = exact(theirs, tokens, window)
        upstream = torch.randn_like(expected)
        attended.backward(upstream.to(dtype))
        expected.backward(upstream)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(attended.double(), expected, atol=tolerance, rtol=tolerance)
    for own, other in zip(ours, theirs, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        error = (own.grad.double() - other.grad).abs().max() / other.grad.abs().max()
        assert float(error) < tolerance
