"""Causal self-attention through PyTorch's scaled_dot_product_attention, in the place of Megatron-core's own.

Megatron-core's local attention materialises the scores and wants the CUDA random tracker; its other ones need
Transformer Engine. This one runs PyTorch's flash kernels on GPU and CPU alike.
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
    """softmax(q k^T / sqrt(d) + causal mask) v, built by Megatron-core's SelfAttention as its core attention.

    With `rotary`, query and key are turned by their positions first: Megatron-core would work out cosines and sines
    anew in every layer. With a window a token sees itself and the tokens before it, as many as the window in all.
    """

    def __init__(self, config: TransformerConfig, rotary: Rotary | None = None, **_: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.grouped = config.num_query_groups != config.num_attention_heads
        self.window = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Query [length, batch, heads, d], key and value [length, batch, groups, d] -> [length, batch, heads * d].

        `mask` [batch, 1, length, length] is true where a token may see another; without one it sees all before it.
        """
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        if self.window is not None and self.window < query.shape[0]:
            seen = torch.ones(query.shape[0], query.shape[0], dtype=torch.bool, device=query.device)
            window = seen.tril().triu(1 - self.window)
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
    """The RMS norm of every head's query or key, with one weight for all heads.

    Each tensor parallel rank has some of the heads only, so the weight's gradient is summed over the ranks.
    """

    def __init__(self, *, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.shared = config.tensor_model_parallel_size > 1

    def forward(self, heads: Tensor) -> Tensor:
        """Heads [length, batch, heads, d], normed over d."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.shared else self.weight
        return functional.rms_norm(heads, self.normalized_shape, weight, self.eps)


def within_documents(tokens: Tensor, end_of_text: int) -> Tensor:
    """Which tokens see which, where a sequence [batch, length] is packed with documents that don't see each other.

    Each document ends with `end_of_text`, which is its own last token. Returns a mask [batch, 1, length, length].
    """
    ends = tokens == end_of_text
    document = ends.cumsum(1) - ends.long()
    together = document[:, None, :, None] == document[:, None, None, :]
    return together.tril()
