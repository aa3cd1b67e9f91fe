"""Lower bound of the step time of a group, from data sheet figures of the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.launch.gpus import Gpu
from btm_scale.launch.memory import rank_parameters
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import TrainedPart

# Bytes/s that a rank gathers, hashes (SHA-256) and writes; one core hashes 0.5 to 2 GB/s.
RANK_WRITES = 0.5e9
_MOMENTS = 2  # in a checkpoint, beside the float32 master weights


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Compute and memory traffic overlap; communication is added."""

    compute: float
    memory: float
    tensor: float
    data: float

    @property
    def total(self) -> float:
        """Seconds of the complete step."""
        return max(self.compute, self.memory) + self.tensor + self.data


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
    traffic = width * (2 * own + trained) * accumulation + 2 * 12 * trained / (layout.data if layout.zero else 1)
    return StepTime(
        compute=flops / peak,
        memory=traffic / (gpu.bandwidth * gpu.transfer_share),
        tensor=_tensor_bytes(shape, layout, tokens / layout.data, width) / (gpu.link * gpu.transfer_share),
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


def _data_bytes(own: float, trained: float, layout: Layout, accumulation: int, width: int) -> float:
    """Return the bytes that a rank sends to the other data ranks: gradients scattered and weights gathered once. ZeRO 2
    scatters the gradients of each micro-batch; ZeRO 3 also gathers the weights twice for each."""
    ring = (layout.data - 1) / layout.data
    if layout.zero == 3:
        return (2 * own + trained) * accumulation * ring * width
    return (accumulation + 1 if layout.zero == 2 else 2) * ring * trained * width


def _between(layout: Layout, gpu: Gpu, ranks_per_node: int) -> float:
    return gpu.link if layout.ranks <= ranks_per_node else gpu.network
