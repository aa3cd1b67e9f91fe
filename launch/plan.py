"""Estimates for a run on any cluster: memory, time and placement of each group, from data sheet figures."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace

from btm_scale.config.layout import Layout
from btm_scale.errors import LaunchError
from btm_scale.launch.gpus import Gpu
from btm_scale.launch.memory import RankMemory, rank_memory
from btm_scale.launch.placement import Placed, Work, lower_bound, place
from btm_scale.launch.step_time import StepTime, checkpoint_seconds, context_bytes, context_spans_nodes, step_time
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import TrainedPart

# Fraction of GPU memory left by driver, communication library and fragmentation.
_USABLE = 0.9
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MOST_NODES = 4096  # searched for a layout that fits
_LENGTH_STEP, _MOST_LENGTHS = 1024, 1 << 16  # tokens of a sequence, of which multiples are tried


@dataclass(frozen=True)
class Cluster:
    """`nodes` with `ranks_per_node` GPUs each."""

    gpu: Gpu
    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """The number of GPUs."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Training:
    """The training of one model in any layout: `steps` of `sequences` sequences of `length` tokens."""

    name: str
    steps: int
    sequences: int
    length: int
    separate_documents: bool = False
    trains: TrainedPart = "all"


@dataclass(frozen=True)
class GroupPlan:
    """The group of one model: its layout, the memory of a rank, and the times of a step and a checkpoint.

    In a step, each rank sends `exchanged` bytes to its context ranks; `spans_nodes` if some are on other nodes.
    """

    shape: ModelShape
    training: Training
    layout: Layout
    micro_batch: int
    accumulation: int
    memory: RankMemory
    step: StepTime
    checkpoint: float  # seconds
    exchanged: float
    spans_nodes: bool

    @property
    def seconds(self) -> float:
        """Duration of the training."""
        return self.training.steps * self.step.total

    @property
    def tokens_per_second(self) -> float:
        """Throughput of the group."""
        return self.training.sequences * self.training.length / self.step.total

    @property
    def work(self) -> Work:
        """The work to place."""
        return Work(self.training.name, self.layout.ranks, self.layout.colocated, self.seconds)


@dataclass(frozen=True)
class StagePlan:
    """Groups that may run at once, where and when they run, and the lower bound of any placement in seconds."""

    groups: tuple[GroupPlan, ...]
    placed: tuple[Placed, ...]
    bound: float

    @property
    def seconds(self) -> float:
        """Time until the last group ends."""
        return max(one.end for one in self.placed)


def plan_group(shape: ModelShape, training: Training, layout: Layout, cluster: Cluster) -> GroupPlan:
    """Return the plan of one group in a given layout. Raises LaunchError if `data` does not divide the batch."""
    for problem in layout.batch_problems(training.sequences):
        raise LaunchError(f"{training.name}: {problem}")
    micro, count = layout.micro_batches(training.sequences)
    memory = rank_memory(
        shape,
        layout,
        micro_batch=micro,
        length=training.length,
        accumulation=count,
        separate_documents=training.separate_documents,
        trains=training.trains,
    )
    step = step_time(
        shape,
        layout,
        cluster.gpu,
        sequences=training.sequences,
        length=training.length,
        accumulation=count,
        ranks_per_node=cluster.ranks_per_node,
        trains=training.trains,
    )
    saved = checkpoint_seconds(shape, layout, training.trains)
    exchanged = context_bytes(shape, layout, training.sequences * training.length)
    spans_nodes = context_spans_nodes(layout, cluster.ranks_per_node)
    return GroupPlan(shape, training, layout, micro, count, memory, step, saved, exchanged, spans_nodes)


def longest_sequence(group: GroupPlan, cluster: Cluster) -> int:
    """Return the most tokens in a sequence that fit a GPU's memory in the group's layout, at a micro-batch of one.

    It is rounded down to a multiple of 1,024 that the layout can cut, and 0 if the model itself does not fit. A model
    may have fewer positions.
    """
    layout = group.layout
    length = math.lcm(_LENGTH_STEP, layout.context * (layout.tensor if layout.sequence_parallel else 1))

    def fits(steps: int) -> bool:
        memory = rank_memory(
            group.shape,
            group.layout,
            micro_batch=1,
            length=steps * length,
            accumulation=group.training.sequences // group.layout.data,
            separate_documents=group.training.separate_documents,
            trains=group.training.trains,
        )
        return memory.total <= _USABLE * cluster.gpu.memory

    return length * bisect.bisect_left(range(1, _MOST_LENGTHS), True, key=lambda steps: not fits(steps))


def plan_stage(groups: Sequence[GroupPlan], cluster: Cluster) -> StagePlan:
    """Return the placed groups of one stage. Raises LaunchError if one needs more memory or ranks than there are."""
    for group in groups:
        _require_memory(group, cluster)
    works = [group.work for group in groups]
    size = {"nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node}
    return StagePlan(tuple(groups), tuple(place(works, **size)), lower_bound(works, **size))


def propose(shape: ModelShape, trainings: Sequence[Training], cluster: Cluster, base: Layout) -> tuple[Layout, int]:
    """Return the layout and micro-batch with which all these trainings, run at once, end first.

    It keeps the precision of `base`. Raises LaunchError, with the smallest number of nodes that is enough, if no layout
    fits the GPU's memory.
    """
    longest = max(trainings, key=lambda training: training.steps * training.sequences)
    if any(training.trains == "all" for training in trainings):  # which needs the most memory
        longest = replace(longest, trains="all")
    batches = {training.sequences for training in trainings}
    # For each group size the fastest layout; of these, the one that ends first.
    best: tuple[float, int, Layout, int] | None = None
    for ranks in _sizes(cluster):
        choice = _best_layout(shape, longest, ranks, cluster, base, batches)
        if choice is None:
            continue
        end = _estimated_end(choice, trainings, cluster)
        if best is None or end < best[0] * 0.98:
            best = (end, ranks, choice.layout, choice.micro_batch)
    if best is None:
        raise LaunchError(
            f"{longest.name}: no layout on {cluster.ranks} {cluster.gpu.name} fits {cluster.gpu.memory / 1e9:.0f} GB. "
            f"{_enough_nodes(shape, longest, cluster, base, batches)}"
        )
    return best[2], best[3]


def _enough_nodes(shape: ModelShape, training: Training, cluster: Cluster, base: Layout, batches: Set[int]) -> str:
    """Return a sentence with the smallest number of nodes on which a layout fits."""
    nodes = 1  # groups of several nodes have a power of 2 of them
    while nodes <= _MOST_NODES:
        if nodes > cluster.nodes:
            larger = replace(cluster, nodes=nodes)
            if _best_layout(shape, training, larger.ranks, larger, base, batches) is not None:
                return f"A group needs at least {nodes} nodes of {cluster.ranks_per_node}: pass --nodes {nodes}."
        nodes *= 2
    return "More nodes do not help. Use larger GPUs, a smaller model, shorter sequences, a larger batch, or offload."


def data_parallel_bytes(shape: ModelShape, groups: int, steps: int, width: int) -> float:
    """Return the bytes that data parallelism over all groups would send between them: per step a ring all-reduce of the
    gradients over `groups` replicas."""
    return 2.0 * (groups - 1) * shape.parameters * width * steps


def _sizes(cluster: Cluster) -> Iterator[int]:
    """Yield the possible sizes of groups: powers of 2 within a node, then complete nodes."""
    size = 1
    while size < cluster.ranks_per_node:
        yield size
        size *= 2
    size = cluster.ranks_per_node
    while size <= cluster.ranks:
        yield size
        size *= 2


def _best_layout(
    shape: ModelShape, training: Training, ranks: int, cluster: Cluster, base: Layout, batches: Set[int]
) -> GroupPlan | None:
    """Return the fastest group of a size whose `data` divides all these batches; None if none fits.

    Sequences are shared by as few context ranks as possible.
    """
    context = 1
    while context <= min(ranks, shape.heads):
        fitting = [
            group
            for layout in _layouts(ranks, context, cluster, base)
            if not layout.problems(shape, training.length)
            and not any(layout.batch_problems(sequences) for sequences in batches)
            for group in _largest_micro_batch(shape, training, layout, cluster)
        ]
        if fitting:
            return min(fitting, key=lambda group: (group.step.total, group.memory.total))
        context *= 2
    return None


def _layouts(ranks: int, context: int, cluster: Cluster, base: Layout) -> Iterator[Layout]:
    tensor = 1
    while tensor <= min(ranks, cluster.ranks_per_node):
        if ranks % (tensor * context) == 0 and cluster.ranks_per_node % tensor == 0:
            for zero in (1, 2, 3) if ranks > tensor else (1,):
                for recompute in ("none", "full"):
                    yield Layout(
                        tensor=tensor,
                        context=context,
                        data=ranks // (tensor * context),
                        zero=zero,
                        recompute=recompute,
                        sequence_parallel=tensor > 1,
                        precision=base.precision,
                    )
        tensor *= 2


def _largest_micro_batch(
    shape: ModelShape, training: Training, layout: Layout, cluster: Cluster
) -> Iterator[GroupPlan]:
    """Yield the group with the largest micro-batch that fits in memory, if any does."""
    share = training.sequences // layout.data
    for micro in sorted({min(size, share) for size in _MICRO_BATCHES}, reverse=True):
        group = plan_group(shape, training, layout.model_copy(update={"micro_batch": micro}), cluster)
        if _fits(group, cluster):
            yield group
            return


def _estimated_end(group: GroupPlan, trainings: Sequence[Training], cluster: Cluster) -> float:
    """Return when the last training would end in groups like this one, in seconds: the lower bound in full waves."""
    seconds_per_sequence = group.step.total / group.training.sequences
    works = sorted((training.steps * training.sequences * seconds_per_sequence for training in trainings), reverse=True)
    at_once = max(1, cluster.ranks // group.layout.ranks)
    waves = -(-len(works) // at_once)
    return max(works[0], sum(works) / at_once, waves * works[-1])


def _fits(group: GroupPlan, cluster: Cluster) -> bool:
    return group.memory.total <= _USABLE * cluster.gpu.memory


def _require_memory(group: GroupPlan, cluster: Cluster) -> None:
    if not _fits(group, cluster):
        gpu = cluster.gpu
        raise LaunchError(
            f"{group.training.name}: a rank needs {group.memory.total / 1e9:.1f} GB, and {_USABLE:.0%} of the "
            f"{gpu.memory / 1e9:.0f} GB of a {gpu.name} are usable. Raise tensor, context, data or zero, set "
            f"recompute: full{_or_offload(group)}, or lower micro_batch{_or_length(group, cluster)}."
        )


def _or_offload(group: GroupPlan) -> str:
    """Return a remedy if the inputs of recomputed layers can leave the GPU."""
    layout = group.layout
    recomputes = layout.recompute in ("full", "tiled")
    return " with offload_activations: true" if recomputes and not layout.offload_activations else ""


def _or_length(group: GroupPlan, cluster: Cluster) -> str:
    """Return a remedy if sequences that are too long are the problem."""
    longest = longest_sequence(group, cluster)
    return f", or sequence_length to {longest:,}" if 0 < longest < group.training.length else ""
