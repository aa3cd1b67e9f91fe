"""How much memory one rank of a group needs, by layout (arXiv 1910.02054, and 2205.05198 for activations)."""

from __future__ import annotations

from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.model.shape import ModelShape

_MASTER, _MOMENTS, _SUMS = 4, 8, 4  # bytes a parameter, float32
_ZERO3_BUCKET = 500_000_000  # gradients that ZeRO 3 collects before it scatters them: DeepSpeed's default


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device at their most: states as the optimizer steps, activations before the backward pass."""

    weights: float
    gradients: float
    optimizer: float  # master weights and moments
    activations: float
    buffers: float = 0.0  # DeepSpeed's own
    host: float = 0.0  # what is kept in the host's memory instead

    @property
    def states(self) -> float:
        """What training keeps: weights, gradients, optimizer, and DeepSpeed's buffers."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        """On the device."""
        return self.states + self.activations


def rank_memory(shape: ModelShape, layout: Layout, *, micro_batch: int, length: int, accumulation: int) -> RankMemory:
    """Of one rank of a group: `micro_batch` sequences of `length` tokens at once, `accumulation` times a step."""
    own = rank_parameters(shape, layout.tensor)
    share = own / layout.data  # what ZeRO leaves of something that it shares
    width = layout.bytes_per_weight
    weights = width * (share if layout.zero == 3 else own)
    kept = own if layout.zero == 0 else share
    # Without ZeRO, float32 weights are their own masters.
    optimizer = kept * (_MOMENTS + (0 if layout.zero == 0 and width == 4 else _MASTER))
    gradients = _gradients(own, share, layout, width, accumulation)
    buffers = width * _ZERO3_BUCKET if layout.zero == 3 else 0.0
    host = 0.0
    if layout.offload != "none":
        host += optimizer
        optimizer = 0.0
    if layout.offload == "all":
        host += weights
        weights = 0.0
    activations = activation_bytes(shape, layout, micro_batch=micro_batch, length=length)
    return RankMemory(weights, gradients, optimizer, activations, buffers, host)


def rank_parameters(shape: ModelShape, tensor: int) -> float:
    """Parameters of one tensor rank: its part of every matrix, and all of every norm and of learned positions."""
    norms = (2 * shape.layers + 1) * shape.hidden * (1 if shape.traits.rms_norm else 2)
    whole = norms + (0 if shape.rotary else shape.positions * shape.hidden)
    if shape.traits.linear_bias:
        whole += shape.layers * 2 * shape.hidden  # of the matrices that are cut by their inputs
    if shape.head_norms:
        whole += shape.layers * 2 * shape.head_size
    return whole + (shape.parameters - whole) / tensor


def _gradients(own: float, share: float, layout: Layout, width: int, accumulation: int) -> float:
    """As DeepSpeed 0.19 holds them when the optimizer steps: in the weights' type, and in float32 for the masters.

    Sums over micro-batches are float32; under ZeRO 1 each rank keeps them of all weights until the step.
    """
    if layout.zero == 0:
        return own * (width if width == 4 else width + _SUMS)
    if width == 4 or accumulation == 1:
        return share * (width + _SUMS)
    if layout.zero == 1:
        return own * (width + _SUMS)
    return share * (_SUMS if layout.zero == 2 else 2 * _SUMS)


def activation_bytes(shape: ModelShape, layout: Layout, *, micro_batch: int, length: int) -> float:
    """What the forward pass keeps for the backward pass; attention is fused and keeps no scores.

    The logits are made in chunks and are not counted.
    """
    tokens = micro_batch * length
    width = layout.bytes_per_weight
    norms: float = 4 * shape.hidden  # two norms' inputs and outputs
    if layout.sequence_parallel:
        norms = norms / layout.tensor
    attention = shape.query_key_value_width + 2 * shape.query_width
    mlp = (4 if shape.rotary else 2) * shape.ffn
    layer = norms + (attention + mlp) / layout.tensor
    if layout.recompute == "full":
        kept = shape.hidden / (layout.tensor if layout.sequence_parallel else 1)
        return width * tokens * (shape.layers * kept + layer)
    if layout.recompute == "selective":
        layer -= shape.query_width / layout.tensor
    return width * tokens * (shape.layers * layer + 2 * shape.hidden)
