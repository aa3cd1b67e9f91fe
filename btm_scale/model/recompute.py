"""Activation recomputation in the backward pass, with PyTorch's checkpointing.

Megatron-core's recomputation needs the CUDA RNG tracker. Layers are deterministic, so no RNG state is saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from btm_scale.model.attention import CausalAttention
from btm_scale.model.cpu_layer import CpuLayer
from btm_scale.model.fused_layer import FusedLayer
from btm_scale.model.offload import HostInputs
from btm_scale.model.tiles import rows_per_tile


class RecomputedAttention(CausalAttention):
    """Attention that saves only query, key and value for the backward pass."""

    def forward(self, *args: Any, **named: Any) -> Tensor:
        """See `CausalAttention.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **named)
        return checkpoint(super().forward, *args, use_reentrant=False, preserve_rng_state=False, **named)


class _Recomputed:
    """A layer that saves only its input for the backward pass, on the host if it has `host_inputs`."""

    def __init__(self, *args: Any, host_inputs: HostInputs | None = None, **named: Any) -> None:
        super().__init__(*args, **named)
        self._host_inputs = host_inputs

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
        with self._held(hidden_states):
            return checkpoint(recomputed, hidden_states, use_reentrant=True, preserve_rng_state=False)

    def _held(self, hidden: Tensor) -> contextlib.AbstractContextManager[None]:
        if self._host_inputs is None:
            return contextlib.nullcontext()
        number: int = self.layer_number  # type: ignore[attr-defined]
        return self._host_inputs.holding(hidden, number)


class RecomputedLayer(_Recomputed, CpuLayer):
    """`CpuLayer`, recomputed."""


class RecomputedFusedLayer(_Recomputed, FusedLayer):  # type: ignore[misc]
    """`FusedLayer`, recomputed. Its input is always one tensor, since it `adds`."""


class _Tiled:
    """A recomputed layer whose MLP runs on tiles of the sequence, one after the other.

    A tile is recomputed once more in its backward pass, so that only its inner activations are in memory.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        # Its class must stay MLP, by which Megatron-core decides on the process group.
        mlp: Any = self.mlp  # type: ignore[attr-defined]
        mlp.forward = partial(_in_tiles, mlp.forward)


class TiledLayer(_Tiled, RecomputedLayer):
    """`CpuLayer`, recomputed, with its MLP in tiles."""


class TiledFusedLayer(_Tiled, RecomputedFusedLayer):  # type: ignore[misc]
    """`FusedLayer`, recomputed, with its MLP in tiles."""


def _in_tiles(
    compute: Callable[..., tuple[Tensor, Tensor | None]], hidden: Tensor, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the MLP's output of hidden states [length, batch, hidden], and its bias if that is not added."""
    rows = rows_per_tile(hidden.shape[2], hidden.shape[1])
    if len(hidden) <= rows:
        return compute(hidden, **named)
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    outputs, biases = zip(*(compute(tile, **named) for tile in hidden.split(rows)), strict=True)
    return torch.cat(outputs), biases[0]
