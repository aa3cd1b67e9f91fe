"""The Megatron-core GPT of a ModelShape, with this project's attention and loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from btm_scale.model.attention import CausalAttention
from btm_scale.model.loss import head_loss
from btm_scale.model.shape import ModelShape


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up to a multiple of the tensor parallel size."""
    return -(-vocabulary // tensor) * tensor


class ExpertModel(GPTModel):
    """A GPTModel that gives its loss or its last hidden states; logits of a whole batch are never made."""

    def __init__(self, shape: ModelShape, config: TransformerConfig, spec: ModuleSpec) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=padded_vocabulary(shape.vocabulary, config.tensor_model_parallel_size),
            max_sequence_length=shape.positions,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope" if shape.family == "llama" else "learned_absolute",
            rotary_base=shape.rope_theta,
        )
        self.shape = shape
        self.tensor_group = self.pg_collection.tp if config.tensor_model_parallel_size > 1 else None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean loss in nats for `targets` [batch, length]; without them, hidden states [batch, length, hidden]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return super().forward(tokens, positions, attention_mask=None, labels=targets)

    @property
    def head(self) -> Tensor:
        """This rank's rows of the LM head, [rows, hidden]."""
        return self.shared_embedding_or_output_weight() if self.shape.tied else self.output_layer.weight

    @property
    def first_token(self) -> int:
        """The token that this rank's first row of the LM head stands for."""
        return 0 if self.tensor_group is None else dist.get_rank(self.tensor_group) * len(self.head)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor | None = None, **_: Any) -> Tensor:
        hidden = hidden_states.transpose(0, 1)
        if labels is None:
            return hidden
        return head_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            self.head,
            labels.reshape(-1),
            first_token=self.first_token,
            vocabulary=self.shape.vocabulary,
            group=self.tensor_group,
        )


def build_model(shape: ModelShape, *, tensor: int, dtype: torch.dtype, on_cpu: bool) -> ExpertModel:
    """A model with random weights, on this rank; the group's process groups must stand.

    Weights are drawn from this process's CPU random state and are the same at any tensor parallel size.
    """
    llama = shape.family == "llama"
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        ffn_hidden_size=shape.ffn,
        tensor_model_parallel_size=tensor,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=shape.norm_epsilon,
        activation_func=functional.silu if llama else _gelu_tanh,
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    model = ExpertModel(shape, config, spec).to(dtype)
    return model if on_cpu else model.cuda()


def _gelu_tanh(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")
