"""Causal self-attention through PyTorch's scaled_dot_product_attention, in the place of Megatron-core's own.

Megatron-core's local attention materialises the scores and wants the CUDA random tracker; its other ones need
Transformer Engine. This one runs PyTorch's flash kernels on GPU and CPU alike.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d) + causal mask) v, built by Megatron-core's SelfAttention as its core attention."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Query [length, batch, heads, d], key and value [length, batch, groups, d] -> [length, batch, heads * d]."""
        attended = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            enable_gqa=self.grouped,
        )
        return attended.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
