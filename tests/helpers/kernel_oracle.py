"""The kernels' formulas in float64, as the reference for every implementation."""

from __future__ import annotations

import mmap

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_token_logprobs(hidden: Tensor, heads: list[Tensor], targets: Tensor, soft_cap: float | None = None) -> Tensor:
    """Return float64 [experts, tokens], from one product over the full vocabulary."""
    rows = []
    for states, head in zip(hidden, heads, strict=True):
        logits = states.double() @ head.double().T
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        rows.append(-F.cross_entropy(logits, targets, reduction="none"))
    return torch.stack(rows)


def exact_mixture(logits: Tensor, log_weights: Tensor) -> Tensor:
    """Return float64 [batch, vocab]; an expert of zero weight or without a possible token adds nothing."""
    weights = log_weights.double().softmax(1).nan_to_num(0.0)
    probabilities = logits.double().softmax(2).nan_to_num(0.0)
    return torch.einsum("be,ebv->bv", weights, probabilities).log()


def scoring_case(
    experts: int,
    tokens: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return hidden states, heads and targets whose logits have a standard deviation like a trained model's."""
    generator = torch.Generator(device).manual_seed(experts * 1009 + tokens * 31 + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    states = normal(experts, tokens, hidden).to(dtype)
    heads = [(normal(vocab, hidden) * 3 / hidden**0.5).to(dtype) for _ in range(experts)]
    return states, heads, torch.randint(vocab, (tokens,), generator=generator, device=device)


def mixing_case(experts: int, batch: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits, one in a hundred of which is -inf, and log weights."""
    generator = torch.Generator().manual_seed(experts * 1009 + batch * 31 + vocab)
    logits = (torch.randn(experts, batch, vocab, generator=generator) * 3).to(dtype)
    logits[torch.rand(logits.shape, generator=generator) < 0.01] = -float("inf")
    return logits, torch.randn(batch, experts, generator=generator) * 2


def sparse_tensor(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor whose elements are gigabytes apart, in memory that is reserved but never touched."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    no_reserve = 0x4000  # MAP_NORESERVE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)
