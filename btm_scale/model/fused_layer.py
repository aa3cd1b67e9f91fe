"""Megatron-core's layer and attention with the elementwise kernels of `fused`, for GPUs.

On a CPU, layers run the operations of PyTorch and Megatron-core, whose rounding differs.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from btm_scale.model.fused import AddNorm, SplitRotated
from btm_scale.model.norm import LayerNorm, RMSNorm
from btm_scale.model.rotary import Rotary


class FusedAttention(SelfAttention):
    """Self-attention that splits the QKV projection and applies rotary embeddings in one kernel."""

    def __init__(self, *args: Any, rotary: Rotary | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        self.rotary = rotary

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """Return queries, keys and values, [length, batch, heads or KV heads, d]; see Megatron-core."""
        if self.rotary is None:
            return super().get_query_key_value_tensors(hidden_states, *args, **named)
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return SplitRotated.apply(mixed, *self.rotary.angles(mixed))


class AddRMSNorm(RMSNorm):
    """An RMS norm of a sum, which is returned too."""

    def forward(  # type: ignore[override]
        self, added: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return added + bias + residual, and its norm, [..., hidden] each."""
        total, normed = AddNorm.apply(added, bias, residual, self.weight, None, self.eps)
        return total, normed


class AddLayerNorm(LayerNorm):
    """A layer norm of a sum, which is returned too."""

    def forward(  # type: ignore[override]
        self, added: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return added + bias + residual, and its norm, [..., hidden] each."""
        total, normed = AddNorm.apply(added, bias, residual, self.weight, self.bias, self.eps)
        return total, normed


class FusedLayer(TransformerLayer):
    """A layer whose residual connections are fused with the norms after them, forward and backward."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> tuple[Tensor, None]:
        """Return the hidden states [length, batch, hidden] after the layer, and no context."""
        residual, normed = self.input_layernorm(hidden_states)
        attended, bias = self.self_attention(normed, attention_mask=attention_mask)
        residual, normed = self.pre_mlp_layernorm(attended, bias, residual)
        output, bias = self.mlp(normed)
        return (output if bias is None else output + bias) + residual, None
