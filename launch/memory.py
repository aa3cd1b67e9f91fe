"""Memory per rank, by layout (arXiv 1910.02054; 2205.05198 for activations)."""

from __future__ import annotations

from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.model.shape import ModelShape

_MASTER, _MOMENTS, _SUMS = 4, 8, 4  # bytes per parameter, float32
_ZERO3_BUCKET = 500_000_000  # gradients that ZeRO 3 collects before it scatters them: DeepSpeed's default


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes on the device of one rank: states in the optimizer step, activations before the backward pass."""

    weights: float
    gradients: float
    optimizer: float  # master weights and moments
    activations: float
    buffers: float = 0.0  # DeepSpeed's own
    host: float = 0.0  # offloaded to CPU memory

    @property
    def states(self) -> float:
        """Bytes of weights, gradients, optimizer states and DeepSpeed's buffers."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.states + self.activations


def rank_memory(shape: ModelShape, layout: Layout, *, micro_batch: int, length: int, accumulation: int) -> RankMemory:
    """Return the memory of one rank for micro-batches of `micro_batch` sequences of `length` tokens, `accumulation` of
    them per step."""
    own = rank_parameters(shape, layout.tensor)
    share = own / layout.data  # parameters that ZeRO leaves on each rank
    width = layout.bytes_per_weight
    weights = width * (share if layout.zero == 3 else own)
    kept = own if layout.zero == 0 else share
    # Without ZeRO, float32 weights are also the master weights.
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
    """Return the parameters on one tensor rank: its shard of each matrix, and all norms and learned positions."""
    norms = (2 * shape.layers + 1) * shape.hidden * (1 if shape.traits.rms_norm else 2)
    replicated = norms + (0 if shape.rotary else shape.positions * shape.hidden)
    if shape.traits.linear_bias:
        replicated += shape.layers * 2 * shape.hidden  # biases of row-parallel matrices
    if shape.head_norms:
        replicated += shape.layers * 2 * shape.head_size
    return replicated + (shape.parameters - replicated) / tensor


def _gradients(own: float, share: float, layout: Layout, width: int, accumulation: int) -> float:
    """Return the bytes of gradients in DeepSpeed 0.19's optimizer step: in the dtype of the weights and in float32.

    Sums over micro-batches are float32; with ZeRO 1 each rank keeps those of all weights until the step.
    """
    if layout.zero == 0:
        return own * (width if width == 4 else width + _SUMS)
    if width == 4 or accumulation == 1:
        return share * (width + _SUMS)
    if layout.zero == 1:
        return own * (width + _SUMS)
    return share * (_SUMS if layout.zero == 2 else 2 * _SUMS)


def activation_bytes(shape: ModelShape, layout: Layout, *, micro_batch: int, length: int) -> float:
    """Return the bytes that the forward pass saves for the backward pass; fused attention saves no scores.

    The logits are computed in chunks and are not counted.
    """
    tokens = micro_batch * length
    width = layout.bytes_per_weight
    norms: float = 4 * shape.hidden  # inputs and outputs of two norms
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
