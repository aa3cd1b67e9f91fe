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

from btm_scale.model.norm import rms_norm
from btm_scale.model.packed_attention import attend_packed
from btm_scale.model.packing import Packed, has_flash
from btm_scale.model.rotary import Rotary


class CausalAttention(torch.nn.Module):
    """softmax(q k^T / sqrt(d) + causal mask) v, the core attention of Megatron-core's SelfAttention.

    `rotary` rotates query and key first; Megatron-core would recompute cosines and sines in every layer.
    """

    def __init__(self, config: TransformerConfig, rotary: Rotary | None = None, **_: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Packed | None = None, *_: Any, **__: Any
    ) -> Tensor:
        """Query [length, batch, heads, d], key and value [length, batch, KV heads, d] -> [length, batch, heads * d].

        `seen` is what each token may attend to, as `packing.visible` returns it; None means every earlier token.
        """
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        if seen is not None:
            return attend_packed(query, key, value, seen)
        on_gpu = query.device.type != "cpu"
        grouped = self.grouped
        if grouped and on_gpu and not has_flash(query.device, query.dtype, query.shape[-1]):
            # Of PyTorch's kernels on a GPU, only flash takes grouped heads.
            repeats = query.shape[2] // key.shape[2]
            key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
            grouped = False
        attended = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            enable_gqa=grouped,
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
        assert self.eps is not None
        return rms_norm(heads, weight, self.eps)
