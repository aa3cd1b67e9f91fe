"""Causal self-attention with PyTorch's scaled_dot_product_attention, instead of Megatron-core's.

Megatron-core's local attention materializes the scores and needs the CUDA RNG tracker; its other implementations need
Transformer Engine. PyTorch's flash kernels run on GPU and CPU alike.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from btm_scale.model.rotary import Rotary


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d) + causal mask) v, the core attention of Megatron-core's SelfAttention.

    `rotary` rotates query and key first; Megatron-core would recompute cosines and sines in every layer. With a window
    of n, a token attends to itself and the n - 1 tokens before it.
    """

    def __init__(self, config: TransformerConfig, rotary: Rotary | None = None, **_: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.grouped = config.num_query_groups != config.num_attention_heads
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Query [length, batch, heads, d], key and value [length, batch, KV heads, d] -> [length, batch, heads * d].

        `mask` [batch, 1, length, length] is True where a token may attend to another; None means causal attention.
        """
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        if self.window is not None and self.window < query.shape[0]:
            ones = torch.ones(query.shape[0], query.shape[0], dtype=torch.bool, device=query.device)
            window = ones.tril().triu(1 - self.window)
            mask = window if mask is None else mask & window
        attended = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.grouped,
        )
        return attended.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class HeadNorm(torch.nn.RMSNorm):
    """RMS norm of every head's query or key, with one weight for all heads.

    A tensor parallel rank has only some of the heads, so the weight's gradient is summed over the ranks.
    """

    def __init__(self, *, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.shared = config.tensor_model_parallel_size > 1

    def forward(self, heads: Tensor) -> Tensor:
        """Normalize heads [length, batch, heads, d] over d."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.shared else self.weight
        return functional.rms_norm(heads, self.normalized_shape, weight, self.eps)


def within_documents(tokens: Tensor, end_of_text: int) -> Tensor:
    """Return the causal mask [batch, 1, length, length] of packed documents that do not attend to each other.

    `tokens` [batch, length]; each document ends with `end_of_text`, which belongs to it.
    """
    ends = tokens == end_of_text
    document = ends.cumsum(1) - ends.long()
    same_document = document[:, None, :, None] == document[:, None, None, :]
    return same_document.tril()
