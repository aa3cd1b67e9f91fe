"""Context parallelism by all-to-all (Ulysses, arXiv 2309.14509): ranks share a sequence, and swap it for heads.

Outside attention each context rank has an equal part of every sequence. An all-to-all before attention gives it the
complete sequence of an equal part of the heads, and one after attention returns its part of the sequence, with all
heads. The core attention in between sees positions, documents and windows as on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from btm_scale.model.shape import kv_head_copies


@dataclass(frozen=True)
class ContextPart:
    """The part of every sequence that this rank has: part `index` of `parts` equal ones, on the ranks of `group`."""

    group: dist.ProcessGroup
    index: int
    parts: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> ContextPart:
        """Return the part of this rank in a group of context ranks, in their order."""
        return cls(group, dist.get_rank(group), dist.get_world_size(group))

    def __call__(self, sequences: Tensor) -> Tensor:
        """Return the part [batch, length / parts] of sequences [batch, length]."""
        length = sequences.shape[1]
        assert length % self.parts == 0, f"a sequence of {length} tokens has no {self.parts} equal parts"
        return sequences.unflatten(1, (self.parts, -1))[:, self.index]


class ContextAttention(torch.nn.Module):
    """A core attention between two all-to-alls: it computes this rank's part of the heads over the complete sequence.

    `core` is the class of the core attention, such as `CausalAttention`, and `named` what it is built with.
    """

    def __init__(self, config: TransformerConfig, *, core: type[torch.nn.Module], part: ContextPart, **named: Any):
        super().__init__()
        self.core = core(config, **named)
        self.part = part

    def forward(self, query: Tensor, key: Tensor, value: Tensor, seen: Any = None, *_: Any, **__: Any) -> Tensor:
        """Query [length / parts, batch, heads, d], key and value with KV heads -> [length / parts, batch, heads * d].

        `seen` is what each token of the complete sequences may attend to; see `CausalAttention.forward`.
        """
        copies = kv_head_copies(key.shape[2], self.part.parts)
        if copies > 1:
            key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
        query, key, value = (_ToHeads.apply(heads, self.part) for heads in (query, key, value))
        attended: Tensor = _ToSequence.apply(self.core(query, key, value, seen), self.part)
        return attended


class _ToHeads(torch.autograd.Function):
    """[length / parts, batch, heads, d] -> [length, batch, heads / parts, d], across the context ranks."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, part: ContextPart) -> Tensor:
        ctx.part, ctx.size = part, heads.shape
        return _to_heads(heads, part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _to_sequence(gradients[0].flatten(2), ctx.part).view(ctx.size), None


class _ToSequence(torch.autograd.Function):
    """[length, batch, heads / parts * d] -> [length / parts, batch, heads * d], across the context ranks."""

    @staticmethod
    def forward(ctx: Any, attended: Tensor, part: ContextPart) -> Tensor:
        ctx.part = part
        return _to_sequence(attended, part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _to_heads(gradients[0].unsqueeze(-1), ctx.part).squeeze(-1), None


def _to_heads(heads: Tensor, part: ContextPart) -> Tensor:
    by_rank = heads.unflatten(2, (part.parts, -1)).movedim(2, 0)
    return _exchanged(by_rank, part).flatten(0, 1)


def _to_sequence(attended: Tensor, part: ContextPart) -> Tensor:
    by_rank = attended.unflatten(0, (part.parts, -1))
    return _exchanged(by_rank, part).movedim(0, 2).flatten(2)


def _exchanged(by_rank: Tensor, part: ContextPart) -> Tensor:
    """Send `by_rank[i]` to context rank i, and return what each rank has sent here, in their order."""
    by_rank = by_rank.contiguous()
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank, group=part.group)
    return received
