"""Lower bound of the step time of a group, from data sheet figures of the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.launch.gpus import Gpu
from btm_scale.launch.memory import layer_input_bytes, rank_parameters
from btm_scale.model.shape import ModelShape, kv_head_copies
from btm_scale.model.trained import TrainedPart

# Bytes/s that a rank gathers, hashes (SHA-256) and writes; one core hashes 0.5 to 2 GB/s.
RANK_WRITES = 0.5e9
# Bytes/s that a rank copies to or from pinned host memory: PCIe 4, or PCIe 5 that two GPUs share.
HOST_COPIES = 25e9
_MOMENTS = 2  # in a checkpoint, beside the float32 master weights


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Compute and memory traffic overlap; communication is added.

    So do copies of layers' inputs: half of `host` leaves in the forward passes, a quarter of the time of recomputed
    layers, and half returns in the backward passes.
    """

    compute: float
    memory: float
    host: float
    tensor: float
    context: float
    data: float

    @property
    def total(self) -> float:
        """Seconds of the complete step."""
        layers, copies = max(self.compute, self.memory), self.host / 2
        overlapped = max(layers / 4, copies) + max(layers * 3 / 4, copies)
        return overlapped + self.tensor + self.context + self.data


def step_time(
    shape: ModelShape,
    layout: Layout,
    gpu: Gpu,
    *,
    sequences: int,
    length: int,
    accumulation: int,
    ranks_per_node: int,
    trains: TrainedPart = "all",
) -> StepTime:
    """Return the time of a step of `sequences` sequences of `length` tokens, `accumulation` micro-batches per rank."""
    tokens = sequences * length
    own = rank_parameters(shape, layout.tensor)
    trained = rank_parameters(shape, layout.tensor, trains)
    width = layout.bytes_per_weight
    flops = shape.flops_per_token(length, trains) * tokens / layout.ranks
    if layout.recompute in ("full", "tiled"):
        flops *= 4 / 3  # the forward pass is a third of it, and runs twice
    if layout.recompute == "tiled" and not shape.experts:
        flops += 2 * shape.layer_matrices("mlp") * tokens / layout.ranks  # and that of MLPs three times
    peak = gpu.peak(layout.precision) * gpu.compute_share
    # Weights are read forward, backward and for their gradient; the optimizer reads and writes master and moments.
    traffic = width * (2 * own + trained) * accumulation + 2 * 12 * trained / (layout.replicas if layout.zero else 1)
    return StepTime(
        compute=flops / peak,
        memory=traffic / (gpu.bandwidth * gpu.transfer_share),
        host=_host_bytes(shape, layout, tokens / layout.replicas) / HOST_COPIES,
        tensor=_tensor_bytes(shape, layout, tokens / layout.replicas, width) / (gpu.link * gpu.transfer_share),
        context=_context_seconds(context_bytes(shape, layout, tokens), layout, gpu, ranks_per_node),
        data=_data_bytes(own, trained, layout, accumulation, width)
        / (_between(layout, gpu, ranks_per_node) * gpu.transfer_share),
    )


def checkpoint_seconds(shape: ModelShape, layout: Layout, trains: TrainedPart = "all") -> float:
    """Return the time to save a training checkpoint, of which each rank writes its part, on storage fast enough."""
    kinds = _MOMENTS + (layout.sync_every > 1)  # the outer momentum of local steps
    return 4 * (shape.parameters + kinds * shape.trained_parameters(trains)) / (layout.ranks * RANK_WRITES)


def _tensor_bytes(shape: ModelShape, layout: Layout, tokens: float, width: int) -> float:
    """Return the bytes that a rank sends to its tensor ranks: four ring all-reduces of the hidden states per layer."""
    ring = 2 * (layout.tensor - 1) / layout.tensor
    # The forward pass has two of them; tiles repeat that of the MLP once more.
    repeated = {"full": 1.5, "tiled": 1.5 if shape.experts else 1.75}.get(layout.recompute, 1.0)
    return 4 * repeated * shape.layers * tokens * shape.hidden * width * ring


def context_bytes(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Return the bytes that a rank sends to its context ranks in a step of `tokens` tokens.

    In each layer, all-to-alls of queries, keys, values and attention's output, and of their gradients.
    """
    if layout.context == 1:
        return 0.0
    copies = kv_head_copies(shape.kv_heads // layout.tensor, layout.context)
    numbers = (2 * shape.query_width + 2 * copies * shape.kv_heads * shape.head_size) / layout.tensor
    passes = 3 if layout.recompute in ("full", "tiled") else 2
    others = (layout.context - 1) / layout.context
    return passes * shape.layers * tokens / layout.replicas * numbers * layout.bytes_per_weight * others


def context_spans_nodes(layout: Layout, ranks_per_node: int) -> bool:
    """Return whether ranks that share a sequence are on different nodes, between which they are slower."""
    return layout.context > 1 and layout.tensor * layout.context > ranks_per_node


def _context_seconds(sent: float, layout: Layout, gpu: Gpu, ranks_per_node: int) -> float:
    """Return the time of all-to-alls in which a rank sends `sent` bytes, equally many to each other context rank.

    Those to its node and to other nodes overlap.
    """
    inside = min(layout.context, max(1, ranks_per_node // layout.tensor))
    outside = (layout.context - inside) / max(1, layout.context - 1)
    return sent * max((1 - outside) / gpu.link, outside / gpu.network) / gpu.transfer_share


def _host_bytes(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Return the bytes that a rank copies to the host in the forward passes and back in the backward passes."""
    return 2 * (shape.layers - 1) * layer_input_bytes(shape, layout, tokens) * layout.offload_activations


def _data_bytes(own: float, trained: float, layout: Layout, accumulation: int, width: int) -> float:
    """Return the bytes that a rank sends to the other ranks with its weights: gradients scattered and weights gathered
    once. ZeRO 2 scatters the gradients of each micro-batch; ZeRO 3 also gathers the weights twice for each."""
    ring = (layout.replicas - 1) / layout.replicas
    if layout.zero == 3:
        return (2 * own + trained) * accumulation * ring * width
    return (accumulation + 1 if layout.zero == 2 else 2) * ring * trained * width


def _between(layout: Layout, gpu: Gpu, ranks_per_node: int) -> float:
    return gpu.link if layout.ranks <= ranks_per_node else gpu.network
