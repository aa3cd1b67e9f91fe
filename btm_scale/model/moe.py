"""A mixture of experts in Megatron-core's layers: its MoE layer and experts, with another router.

Megatron-core's router needs Transformer Engine, and weights the only expert of a token other than transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from btm_scale.model.shape import ModelShape


class Router(torch.nn.Module):
    """Sends each token to the `top_k` experts with the largest softmax(x W^T), whose weights are scaled to sum to 1.

    In training it adds two losses to that of the language model, each summed over layers: `z_loss` times the mean of
    logsumexp(logits)^2, and `balance` times experts * sum_e f_e P_e (arXiv 2101.03961), where P_e is the mean
    probability of expert e. f_e is the `load` of the step before, counted over all ranks and micro-batches, so that
    every layout has the same gradient.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.experts: int = config.num_moe_experts
        self.top_k: int = config.moe_router_topk
        self.weight = torch.nn.Parameter(torch.empty(self.experts, config.hidden_size))
        # Each tensor rank routes its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._copies = config.tensor_model_parallel_size if config.sequence_parallel else 1
        self.z_loss = self.balance = 0.0
        self.load: Tensor | None = None  # [experts], fractions
        self.gradient_scale = GradientScale()  # the model replaces it by one that all of its routers share
        # Since the last `take_routing`, float64 [sequences, experts + 2], of which a model that is not in training has
        # one: how often each expert was used, the sum of the tokens' entropies, and tokens.
        self.counts: Tensor | None = None
        config.init_method(self.weight)

    def forward(self, hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Return the weight of each expert, float32 [tokens, experts], and which are used, for hidden [..., hidden]."""
        # Rounded logits would send tokens to other experts.
        logits = hidden.reshape(-1, hidden.shape[-1]).float() @ self.weight.float().t()
        probabilities = logits.softmax(dim=-1)
        chosen, places = probabilities.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(1, places, chosen / chosen.sum(dim=-1, keepdim=True))
        used = torch.zeros_like(logits, dtype=torch.bool).scatter(1, places, True)
        # Recomputed layers run twice in training, the first time without gradients.
        if torch.is_grad_enabled() or not self.training:
            self._count(probabilities.detach(), used, sequences=hidden.shape[1] if hidden.dim() == 3 else 1)
        if self.training and torch.is_grad_enabled() and (self.z_loss or self.balance):
            weights = _WithLoss.apply(weights, self._losses(logits, probabilities), self.gradient_scale)
        return weights, used

    def _losses(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Return the sum of both losses of a micro-batch, a scalar, divided by the ranks that shard its sequences."""
        loss = self.z_loss * logits.logsumexp(dim=-1).square().mean()
        if self.balance and self.load is not None:
            loss = loss + self.balance * len(self.load) * (self.load * probabilities.mean(dim=0)).sum()
        return loss / self._copies

    @torch.no_grad()
    def _count(self, probabilities: Tensor, used: Tensor, sequences: int) -> None:
        """Count the uses of each expert by tokens [positions * sequences]."""
        entropy = torch.special.entr(probabilities).sum(dim=1).double()
        tokens = torch.cat([used.double(), torch.stack([entropy, torch.ones_like(entropy)], dim=1)], dim=1)
        counts = tokens.view(-1, sequences, self.experts + 2).sum(dim=0)
        if not self.training:
            counts = counts.sum(dim=0, keepdim=True)
            self.counts = counts if self.counts is None else self.counts + counts
        else:
            self.counts = counts if self.counts is None else torch.cat([self.counts, counts])

    def set_layer_number(self, number: int) -> None:
        """Do nothing; Megatron-core's router numbers its statistics."""


class GradientScale:
    """The gradient with respect to the language model's loss: the factor of loss scaling and accumulation."""

    value: Tensor | None = None


class _WithLoss(torch.autograd.Function):
    """Returns a tensor; its backward pass is also that of a scalar loss, even in a layer that is recomputed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grad_outputs[0], ctx.scale.value, None


class _RecordedScale(torch.autograd.Function):
    """Returns the language model's loss, and records its gradient in the backward pass before that of any layer."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: GradientScale) -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.scale.value = grad_outputs[0].float()
        return grad_outputs[0], None


def with_recorded_scale(loss: Tensor, scale: GradientScale) -> Tensor:
    """Return the language model's loss; its backward pass sets `scale`, by which the routers' losses are scaled."""
    result: Tensor = _RecordedScale.apply(loss, scale)
    return result


def routers_of(model: torch.nn.Module) -> list[Router]:
    """Return the routers of a model, in layer order; none of a model without experts."""
    return [module for module in model.modules() if isinstance(module, Router)]


@dataclass(frozen=True)
class Routing:
    """How tokens were routed: each expert's fraction of a layer's uses, and the mean entropy of its router in nats."""

    load: list[list[float]]  # [layers, experts]
    entropy: list[float]  # [layers]
    by_domain: Mapping[str, Routing] = field(default_factory=dict)  # of the domains that had a sequence


def take_routing(
    model: torch.nn.Module,
    group: dist.ProcessGroup | None,
    device: torch.device,
    domains: Sequence[str] = (),
    known: Sequence[str] = (),
) -> Routing | None:
    """Return how tokens were routed since the last call, on all ranks of `group`, which call this together.

    `domains` are those of this rank's sequences since then, of a model in training; `known` are all domains of its
    text, in the same order on every rank. None for a model without experts.
    """
    routers = routers_of(model)
    if not routers:
        return None
    # [domains, layers, experts + 2]; the last row is of text without a domain
    counts = torch.zeros(len(known) + 1, len(routers), routers[0].experts + 2, dtype=torch.float64, device=device)
    place = torch.tensor([known.index(domain) for domain in domains], device=device)
    for layer, router in enumerate(routers):
        if router.counts is not None and domains:
            counts[:, layer].index_add_(0, place, router.counts)
        elif router.counts is not None:
            counts[-1, layer] = router.counts.sum(dim=0)
        router.counts = None
    if group is not None:
        dist.all_reduce(counts, group=group)
    counts = counts.cpu()
    total = _fractions(counts.sum(dim=0))
    by_domain = {name: _fractions(own) for name, own in zip(known, counts[:-1], strict=True) if own.any()}
    return Routing(*total, by_domain={name: Routing(*one) for name, one in by_domain.items()})


def _fractions(counts: Tensor) -> tuple[list[list[float]], list[float]]:
    """Return the loads and the entropies of counts [layers, experts + 2]."""
    used, entropy, tokens = counts[:, :-2], counts[:, -2], counts[:, -1]
    return (used / used.sum(dim=1, keepdim=True)).tolist(), (entropy / tokens).tolist()


def mixture_settings(shape: ModelShape) -> dict[str, Any]:
    """Return the settings of a TransformerConfig for the experts of a shape; none for a shape without."""
    if not shape.experts:
        return {}
    shared = {"moe_shared_expert_intermediate_size": shape.shared_ffn, "moe_shared_expert_gate": True}
    return {
        **(shared if shape.shared_ffn else {}),
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
