"""Activation recomputation in the backward pass, with PyTorch's checkpointing.

Megatron-core's recomputation needs the CUDA RNG tracker. Layers are deterministic, so no RNG state is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from btm_scale.model.attention import CausalAttention
from btm_scale.model.fused_layer import FusedLayer


class RecomputedAttention(CausalAttention):
    """Attention that saves only query, key and value for the backward pass."""

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """See `CausalAttention.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **named)
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **named)


class _Recomputed:
    """A layer that saves only its input for the backward pass."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """See `TransformerLayer.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **named)  # type: ignore[misc]

        if not hidden_states.requires_grad:
            # No parameter below is trained. PyTorch recomputes a layer only if its input requires a gradient.
            hidden_states = hidden_states.detach().requires_grad_()

        def recomputed(hidden: Tensor) -> Any:
            return super(_Recomputed, self).forward(hidden, *args, **named)  # type: ignore[misc]

        # Reentrant, so that ZeRO 3 gathers weights for the graph of the backward pass: otherwise recomputing the layer
        # releases weights that its backward pass still needs.
        return checkpoint(recomputed, hidden_states, use_reentrant=True, preserve_rng_state=False)


class RecomputedLayer(_Recomputed, TransformerLayer):
    """Megatron-core's layer, recomputed."""


class RecomputedFusedLayer(_Recomputed, FusedLayer):
    """`FusedLayer`, recomputed."""
