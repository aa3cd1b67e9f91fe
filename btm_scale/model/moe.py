"""A mixture of experts in Megatron-core's layers: its MoE layer and experts, with another router.

Megatron-core's router needs Transformer Engine, and weights the only expert of a token other than transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from btm_scale.model.shape import ModelShape


class Router(torch.nn.Module):
    """Sends each token to the `top_k` experts with the largest softmax(x W^T), whose weights are scaled to sum to 1."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.top_k: int = config.moe_router_topk
        self.weight = torch.nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size))
        config.init_method(self.weight)

    def forward(self, hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Return the weight of each expert, float32 [tokens, experts], and which are used, for hidden [..., hidden]."""
        # Rounded logits would send tokens to other experts.
        logits = hidden.reshape(-1, hidden.shape[-1]).float() @ self.weight.float().t()
        chosen, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(1, experts, chosen / chosen.sum(dim=-1, keepdim=True))
        used = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        return weights, used

    def set_layer_number(self, number: int) -> None:
        """Do nothing; Megatron-core's router numbers its statistics."""


def mixture_settings(shape: ModelShape) -> dict[str, Any]:
    """Return the settings of a TransformerConfig for the experts of a shape; none for a shape without."""
    if not shape.experts:
        return {}
    return {
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.top_k,
        "moe_ffn_hidden_size": shape.ffn,
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,  # not used, but the default is refused for one expert per token
        # Without expert parallelism it exchanges tokens between tensor parallel ranks only, and needs no CUDA.
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
    }


def mixture_spec(shape: ModelShape) -> ModuleSpec:
    """Return the spec that replaces a layer's MLP."""
    spec = get_moe_module_spec(use_te=False, num_experts=shape.experts, moe_grouped_gemm=False)
    spec.submodules.router = Router
    return spec
