"""How long one step of a group takes at the least, from stated figures of the GPU."""

from __future__ import annotations

from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.launch.gpus import Gpu
from btm_scale.launch.memory import rank_parameters
from btm_scale.model.shape import ModelShape


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Computing and reading memory go on together; communication comes on top."""

    compute: float
    memory: float
    tensor: float
    data: float

    @property
    def total(self) -> float:
        """Seconds."""
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
) -> StepTime:
    """Of `sequences` sequences of `length` tokens, in `accumulation` micro-batches a rank."""
    tokens = sequences * length
    own = rank_parameters(shape, layout.tensor)
    width = layout.bytes_per_weight
    flops = shape.flops_per_token(length) * tokens / layout.ranks
    if layout.recompute == "full":
        flops *= 4 / 3  # the forward pass is a third of it, and is made twice
    peak = gpu.peak(layout.precision) * gpu.compute_share
    # Weights are read forward, backward and for their gradient; the optimizer reads and writes master and moments.
    traffic = 3 * width * own * accumulation + 2 * 12 * own / (layout.data if layout.zero else 1)
    return StepTime(
        compute=flops / peak,
        memory=traffic / (gpu.bandwidth * gpu.transfer_share),
        tensor=_tensor_bytes(shape, layout, tokens / layout.data, width) / (gpu.link * gpu.transfer_share),
        data=_data_bytes(own, layout, accumulation, width)
        / (_between(layout, gpu, ranks_per_node) * gpu.transfer_share),
    )


def _tensor_bytes(shape: ModelShape, layout: Layout, tokens: float, width: int) -> float:
    """Bytes that a rank sends within its tensor group: four all-reduces of the hidden states a layer, as rings."""
    ring = 2 * (layout.tensor - 1) / layout.tensor
    repeated = 1.5 if layout.recompute == "full" else 1.0
    return 4 * repeated * shape.layers * tokens * shape.hidden * width * ring


def _data_bytes(own: float, layout: Layout, accumulation: int, width: int) -> float:
    """Bytes that a rank sends to the other data ranks: gradients scattered and weights gathered once. ZeRO 2 keeps no
    whole gradients, so it scatters those of each micro-batch; ZeRO 3 gathers weights twice for each as well."""
    ring = (layout.data - 1) / layout.data
    times = {2: accumulation + 1, 3: 3 * accumulation}.get(layout.zero, 2)
    return times * ring * own * width


def _between(layout: Layout, gpu: Gpu, ranks_per_node: int) -> float:
    return gpu.link if layout.ranks <= ranks_per_node else gpu.network
