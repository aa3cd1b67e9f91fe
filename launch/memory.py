"""Memory per rank, by layout (arXiv 1910.02054; 2205.05198 for activations)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.model.loss_chunks import row_elements, tokens_per_chunk
from btm_scale.model.shape import ModelShape, kv_head_copies
from btm_scale.model.tiles import rows_per_tile
from btm_scale.model.trained import TrainedPart

_MASTER, _MOMENTS, _SUMS = 4, 8, 4  # bytes per parameter, float32
_LARGEST_FLASH_HEAD, _FLASH_HEADS = 256, 8  # the kernel's largest head size, of which all are multiples of 8
_ZERO3_BUCKET = 500_000_000  # gradients that ZeRO 3 collects before it scatters them: DeepSpeed's default


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes on the device of one rank: states in the optimizer step, activations before the backward pass."""

    weights: float
    gradients: float
    optimizer: float  # master weights and moments
    activations: float
    head: float  # in the loss: gradients of the LM head, and a chunk of logits
    buffers: float = 0.0  # DeepSpeed's own
    host: float = 0.0  # offloaded to CPU memory: states, and inputs of layers

    @property
    def states(self) -> float:
        """Bytes of weights, gradients, optimizer states and DeepSpeed's buffers."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.states + self.activations + self.head


def rank_memory(
    shape: ModelShape,
    layout: Layout,
    *,
    micro_batch: int,
    length: int,
    accumulation: int,
    separate_documents: bool = False,
    trains: TrainedPart = "all",
) -> RankMemory:
    """Return the memory of one rank for micro-batches of `micro_batch` sequences of `length` tokens, `accumulation` of
    them per step. Only the part that it `trains` has gradients and optimizer states."""
    complete = rank_parameters(shape, layout.tensor)
    width = layout.bytes_per_weight
    weights = width * (complete / layout.replicas if layout.zero == 3 else complete)
    own = rank_parameters(shape, layout.tensor, trains)
    share = own / layout.replicas  # parameters that ZeRO leaves on each rank
    kept = own if layout.zero == 0 else share
    # Without ZeRO, float32 weights are also the master weights.
    optimizer = kept * (_MOMENTS + (0 if layout.zero == 0 and width == 4 else _MASTER))
    in_products = shape.layer_matrices(trains) / layout.tensor
    gradients = _gradients(own, share, in_products, layout, accumulation)
    buffers = width * _ZERO3_BUCKET if layout.zero == 3 else 0.0
    host = 0.0
    if layout.offload != "none":
        host += optimizer
        optimizer = 0.0
    if layout.offload == "all":
        host += weights
        weights = 0.0
    activations = activation_bytes(
        shape, layout, micro_batch=micro_batch, length=length, separate_documents=separate_documents
    )
    if layout.float8:
        activations += _float8_copies(shape, layout, micro_batch, length // layout.context)
    if layout.offload_activations:
        host += _host_buffers(shape, layout, micro_batch * length // layout.context)
    head = head_bytes(shape, layout, micro_batch * length // layout.context, trains_head=trains == "all")
    return RankMemory(weights, gradients, optimizer, activations, head, buffers, host)


def rank_parameters(shape: ModelShape, tensor: int, part: TrainedPart = "all") -> float:
    """Return the parameters of a part on one tensor rank: its shard of each matrix, and all norms, positions and
    routers."""
    routers = shape.trained_parameters("router")
    if part != "all":
        biases = shape.layers * shape.hidden * shape.traits.linear_bias if part == "mlp" else 0
        return routers + biases + (shape.trained_parameters(part) - routers - biases) / tensor
    norms = (2 * shape.layers + 1) * shape.hidden * (1 if shape.traits.rms_norm else 2)
    replicated = norms + routers + (0 if shape.rotary else shape.positions * shape.hidden)
    if shape.traits.linear_bias:
        replicated += shape.layers * 2 * shape.hidden  # biases of row-parallel matrices
    if shape.head_norms:
        replicated += shape.layers * 2 * shape.head_size
    return replicated + (shape.parameters - replicated) / tensor


def _gradients(own: float, share: float, in_products: float, layout: Layout, accumulation: int) -> float:
    """Return the bytes of gradients in DeepSpeed 0.19's optimizer step: in the dtype of the weights and in float32.

    Sums over micro-batches are float32; with ZeRO 1 each rank keeps those of all weights until the step. The gradients
    of `in_products` weights exist only in these sums, because matrix products accumulate in them, if DeepSpeed uses its
    BF16_Optimizer: not in fp16, and not if the optimizer is offloaded.
    """
    width = layout.bytes_per_weight
    if layout.zero == 0:
        return own * (width if width == 4 else width + _SUMS)
    if width == 4 or accumulation == 1:
        return share * (width + _SUMS)
    if layout.zero == 1:
        only_sums = in_products if layout.offload == "none" and layout.precision != "fp16" else 0.0
        return own * _SUMS + (own - only_sums) * width
    return share * (_SUMS if layout.zero == 2 else 2 * _SUMS)


def activation_bytes(
    shape: ModelShape, layout: Layout, *, micro_batch: int, length: int, separate_documents: bool = False
) -> float:
    """Return the most bytes that autograd keeps for the backward pass of a micro-batch on a GPU.

    Fused attention keeps no scores. Logits, and the gradients of the LM head that the loss computes, are `head_bytes`.
    """
    tokens = micro_batch * length // layout.context
    width = layout.bytes_per_weight
    own = _own_width(shape, layout)
    packs = separate_documents or (shape.window is not None and shape.window < length)
    has_flash = width == 2 and shape.head_size <= _LARGEST_FLASH_HEAD
    by_piece = packs and not has_flash
    # The product of gate and up, and their SwiGLU, which the layers of a mixture compute with two more results: the
    # gate's SiLU and the shifted up. Without a gate, before and after the GELU.
    mlp = ((5 if shape.experts else 3) if shape.traits.gated else 2) * shape.ffn
    if layout.context > 1:
        attention = _exchanged_width(shape, layout, by_piece=by_piece, padded=packs and has_flash)
    elif layout.recompute == "selective":
        attention = _recomputed_width(shape)
    elif packs and has_flash:
        attention = _packed_width(shape, micro_batch)
    else:
        attention = _attention_width(shape)
    routed = 0.0
    if shape.experts:
        # Each token is copied to its experts, and their outputs are weighted; the router computes in float32.
        mlp = mlp * shape.top_k + 5 * shape.shared_ffn
        parts = layout.tensor if layout.sequence_parallel else 1
        routed = width * 3 * shape.top_k * shape.hidden + _SUMS * (shape.hidden + 4 * shape.experts) / parts
    # Inputs and outputs of both norms.
    statistics = _statistics(shape, layout, keeps_softmax=layout.recompute != "selective" and not by_piece)
    layer = width * (4 * own + (attention + mlp) / layout.tensor) + routed + statistics
    if layout.recompute in ("full", "tiled"):
        # Each layer's input, and all of the layer that is being recomputed; of its MLP perhaps a tile. If inputs are
        # offloaded, those of this layer and of the next one that will be recomputed; in the loss, of the last layer.
        offloads = layout.offload_activations
        inputs = width * own * (min(shape.layers, 2) if offloads else shape.layers)
        at_loss, tile = width * own * (1 if offloads else shape.layers), 0.0
        if layout.recompute == "tiled" and not shape.experts:
            layer -= width * mlp / layout.tensor
            # With sequence parallelism, every rank gathers the tiles of all.
            rows = rows_per_tile(shape.hidden, micro_batch) * (layout.tensor if layout.sequence_parallel else 1)
            tile = width * mlp / layout.tensor * min(length // layout.context, rows) * micro_batch
        return max(tokens * (inputs + layer - width * own) + tile, tokens * (at_loss + width * (own + shape.hidden)))
    # At the end, the input of the last norm and the loss's gradient of its output.
    return tokens * (shape.layers * layer + width * (own + shape.hidden))


def head_bytes(shape: ModelShape, layout: Layout, tokens: int, *, trains_head: bool = True) -> float:
    """Return the most bytes that the loss of `tokens` tokens holds on a GPU, besides the gradient of the hidden states.

    In the forward pass these are a chunk of logits and the LM head's gradient, which is float32 if it is summed over
    several chunks. The backward pass, which holds no logits, returns a scaled copy in the dtype of the weights.
    """
    width = layout.bytes_per_weight
    rows = -(-shape.vocabulary // layout.tensor)
    chunk = tokens_per_chunk(tokens, rows, width, on_cpu=False)
    logits = chunk * row_elements(rows) * width
    if not trains_head:
        return logits
    weights = rows * shape.hidden
    gradient = weights * (width if chunk == tokens else _SUMS)
    return gradient + max(logits, weights * width)


def _float8_copies(shape: ModelShape, layout: Layout, micro_batch: int, length: int) -> float:
    """Return the bytes of the factors of a layer's largest product in float8, which are copied for each product."""
    of_mlp = length
    if layout.recompute == "tiled":
        rows = rows_per_tile(shape.hidden, micro_batch)
        of_mlp = min(length, rows * (layout.tensor if layout.sequence_parallel else 1))
    attention = [(shape.query_key_value_width, length), (shape.query_width, length)]
    sizes = [*attention, (shape.up_width, of_mlp), (shape.ffn, of_mlp)]
    # The other dimension of each matrix is the hidden size; forward and backward, a product sums over either.
    return max(
        width / layout.tensor * shape.hidden + micro_batch * rows * max(width / layout.tensor, shape.hidden)
        for width, rows in sizes
    )


def layer_input_bytes(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Return the bytes of a layer's input on a rank that has `tokens` tokens of a micro-batch."""
    return layout.bytes_per_weight * _own_width(shape, layout) * tokens


def _own_width(shape: ModelShape, layout: Layout) -> float:
    """Return the numbers per token of a hidden state outside of attention and MLP."""
    return shape.hidden / (layout.tensor if layout.sequence_parallel else 1)


def _host_buffers(shape: ModelShape, layout: Layout, tokens: int) -> float:
    """Return the bytes of buffers for the inputs of all layers but the last, in powers of 2: PyTorch rounds up the size
    of pinned memory."""
    size = max(1, math.ceil(layer_input_bytes(shape, layout, tokens)))
    return float((shape.layers - 1) * (1 << (size - 1).bit_length()))


def _attention_width(shape: ModelShape) -> int:
    """Return the numbers per token that attention keeps, on all tensor ranks.

    Values are a view of the product of queries, keys and values, which is kept with them.
    """
    queries, keys = shape.query_width, shape.kv_heads * shape.head_size
    rotated = (queries + keys) * (shape.rotary or shape.head_norms)
    return shape.query_key_value_width + _norm_input(shape) + rotated + queries


def _recomputed_width(shape: ModelShape) -> int:
    """Return the numbers per token that attention keeps if it is recomputed."""
    queries, keys = shape.query_width, shape.kv_heads * shape.head_size
    is_grouped = shape.kv_heads != shape.heads
    copied = queries * (is_grouped or shape.head_norms) + keys * shape.head_norms
    return shape.query_key_value_width + _norm_input(shape) + copied + queries


def _exchanged_width(shape: ModelShape, layout: Layout, *, by_piece: bool, padded: bool) -> int:
    """Return the numbers per token that attention keeps if context ranks swap sequences for heads.

    They are what the ranks have exchanged, and the output before and after. The norm of heads keeps the product.
    Attention that is recomputed, also `by_piece`, keeps no output before; with `padded`, its heads are as its kernel
    takes them.
    """
    queries, keys = shape.query_width, shape.kv_heads * shape.head_size
    copies = kv_head_copies(shape.kv_heads // layout.tensor, layout.context)
    recomputed = by_piece or layout.recompute == "selective"
    attended = queries + 2 * copies * keys + (0 if recomputed else queries)
    if padded and not recomputed:
        attended = attended * _padded(shape) // shape.head_size
    return attended + queries + (shape.query_key_value_width + _norm_input(shape) if shape.head_norms else 0)


def _packed_width(shape: ModelShape, micro_batch: int) -> int:
    """Return the numbers per token that attention within packed sequences keeps.

    The kernel takes one sequence after the other, and heads whose size is a multiple of 8: otherwise queries, keys,
    values and output are copied.
    """
    product, output = shape.query_key_value_width, shape.query_width
    padded = _padded(shape)
    if padded == shape.head_size and micro_batch == 1:
        return _attention_width(shape)
    of_norms = product * shape.head_norms + _norm_input(shape)
    return of_norms + (product + output) * padded // shape.head_size + output


def _padded(shape: ModelShape) -> int:
    """Return the head size that the flash kernel for packed sequences takes."""
    return -(-shape.head_size // _FLASH_HEADS) * _FLASH_HEADS


def _norm_input(shape: ModelShape) -> int:
    """Return the numbers per token that the norm of queries keeps beside the product: those of grouped heads, which
    are copied out of it."""
    return shape.query_width * (shape.kv_heads != shape.heads and shape.head_norms)


def _statistics(shape: ModelShape, layout: Layout, *, keeps_softmax: bool) -> float:
    """Return the bytes per token and layer of float32 numbers per row: of norms, and of attention's softmax."""
    norms = 2 * (1 if shape.traits.rms_norm else 2) / (layout.tensor if layout.sequence_parallel else 1)
    heads = (shape.heads + shape.kv_heads) * shape.head_norms
    softmax = shape.heads * keeps_softmax
    return 4 * (norms + (heads + softmax) / layout.tensor)
