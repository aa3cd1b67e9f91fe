"""Megatron-core's layer and attention with the elementwise kernels of `fused`, for GPUs.

On a CPU, layers run the operations of PyTorch and Megatron-core, whose rounding differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from btm_scale.model.fused import AddNorm, BiasedProduct, BiasGelu, SplitBiased, SplitRotated
from btm_scale.model.norm import LayerNorm, RMSNorm
from btm_scale.model.rotary import Rotary


class BiasedQkv(ColumnParallelLinear):
    """The QKV projection of a group without tensor parallelism, which adds its bias in the product.

    `BiasedAttention` computes the bias's gradient.
    """

    def _forward_impl(
        self, input: Tensor, weight: Any, *, bias: Tensor, gradient_accumulation_fusion: bool, **_: Any
    ) -> Tensor:
        sums = weight.main_grad if gradient_accumulation_fusion else None
        product: Tensor = BiasedProduct.apply(input, weight, bias.detach(), sums)
        return product


class BiasedAttention(SelfAttention):
    """Self-attention that computes the gradients of the QKV projection's output and bias in one kernel."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return queries, keys and values, [length, batch, heads or KV heads, d]; see Megatron-core."""
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return SplitBiased.apply(mixed, self.linear_qkv.bias)


class FusedAttention(SelfAttention):
    """Self-attention that splits the QKV projection and applies rotary embeddings in one kernel."""

    def __init__(self, *args: Any, rotary: Rotary, **named: Any) -> None:
        super().__init__(*args, **named)
        self.rotary = rotary

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """Return queries, keys and values, [length, batch, heads or KV heads, d]; see Megatron-core."""
        mixed, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return SplitRotated.apply(mixed, *self.rotary.angles(mixed))


class Unadded(NamedTuple):
    """A layer's result before its sum, which is computed with the norm after it."""

    output: Tensor
    bias: Tensor | None
    residual: Tensor


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


class LastRMSNorm(AddRMSNorm):
    """The RMS norm after the last layer."""

    def forward(self, hidden_states: Tensor | Unadded) -> Tensor:  # type: ignore[override]
        """Return the norm [..., hidden]."""
        return super().forward(*_terms(hidden_states))[1]


class LastLayerNorm(AddLayerNorm):
    """The layer norm after the last layer."""

    def forward(self, hidden_states: Tensor | Unadded) -> Tensor:  # type: ignore[override]
        """Return the norm [..., hidden]."""
        return super().forward(*_terms(hidden_states))[1]


class FusedLayer(TransformerLayer):
    """A layer whose residual connections are fused with the norms after them, forward and backward.

    With `adds`, its own last sum is not: a recomputed layer keeps one tensor, and ZeRO 3 releases the bias with the
    layer.
    """

    def __init__(self, *args: Any, adds: bool = False, **named: Any) -> None:
        super().__init__(*args, **named)
        self._adds = adds
        if isinstance(self.mlp, MLP) and not self.config.gated_linear_unit:
            # Its class must stay MLP, by which Megatron-core decides on the process group.
            self.mlp.forward = partial(_gelu_mlp, self.mlp)

    def forward(
        self, hidden_states: Tensor | Unadded, attention_mask: Any = None, **_: Any
    ) -> tuple[Tensor | Unadded, None]:
        """Return the hidden states [length, batch, hidden] after the layer, and no context."""
        residual, normed = self.input_layernorm(*_terms(hidden_states))
        attended, bias = self.self_attention(normed, attention_mask=attention_mask)
        residual, normed = self.pre_mlp_layernorm(attended, bias, residual)
        output, bias = self.mlp(normed)
        if self._adds:
            return (output if bias is None else output + bias) + residual, None
        return Unadded(output, bias, residual), None


def _terms(hidden_states: Tensor | Unadded) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return hidden_states if isinstance(hidden_states, Unadded) else (hidden_states, None, None)


def _gelu_mlp(mlp: MLP, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
    """Return an MLP's output and its bias, which is not added; see `MLP.forward`."""
    values, bias = mlp.linear_fc1(hidden_states)
    output, last_bias = mlp.linear_fc2(BiasGelu.apply(values, bias))
    return output, last_bias
