"""Activations that are made again in the backward pass instead of being kept, by PyTorch's checkpointing.

Megatron-core's own recomputation wants the CUDA random tracker. Nothing in a layer is random, so no random state is
kept.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from btm_scale.model.attention import CausalAttention


class RecomputedAttention(CausalAttention):
    """Attention of which only query, key and value are kept."""

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """As CausalAttention's."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **named)
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **named)


class RecomputedLayer(TransformerLayer):
    """A layer of which only the input is kept."""

    def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        """As TransformerLayer's."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, *args, **named)

        def again(hidden: Tensor) -> Any:
            return super(RecomputedLayer, self).forward(hidden, *args, **named)

        # Reentrant, so that ZeRO 3 gathers a weight for the graph that the backward pass goes through: otherwise
        # making the layer again lets go of weights that its backward pass is about to use.
        return checkpoint(again, hidden_states, use_reentrant=True, preserve_rng_state=False)
