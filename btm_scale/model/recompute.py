"""Activations that are made again in the backward pass instead of being kept, by PyTorch's checkpointing.

Megatron-core's own recomputation wants the CUDA random tracker.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from btm_scale.model.attention import CausalAttention

# Nothing in a layer is random, so no random state is kept.
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class RecomputedAttention(CausalAttention):
    """Attention of which only query, key and value are kept."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
        """As CausalAttention's."""
        if not torch.is_grad_enabled():
            return super().forward(query, key, value, *rest, **named)
        return _checkpoint(super().forward, query, key, value, *rest, **named)


class RecomputedLayer(TransformerLayer):
    """A layer of which only the input is kept."""

    def forward(self, *args: Any, **named: Any) -> Any:
        """As TransformerLayer's."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **named)
        # Stopping early would skip the hooks by which ZeRO 3 lets go of the weights that it gathered.
        with set_checkpoint_early_stop(False):
            return _checkpoint(super().forward, *args, **named)
