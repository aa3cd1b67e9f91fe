"""A run on a cluster that need not be there: every group's memory, time and place, from stated figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from btm_scale.config.layout import Layout
from btm_scale.errors import LaunchError
from btm_scale.launch.gpus import Gpu
from btm_scale.launch.memory import RankMemory, rank_memory
from btm_scale.launch.placement import Placed, Work, lower_bound, place
from btm_scale.launch.step_time import StepTime, step_time
from btm_scale.model.shape import ModelShape

# Of a GPU's memory, what is left to us by its driver, the communication library and fragmentation.
_USABLE = 0.9
_MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `ranks_per_node` GPUs."""

    gpu: Gpu
    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """GPUs."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Training:
    """One model's training, whoever does it: `steps` of `sequences` sequences of `length` tokens."""

    name: str
    steps: int
    sequences: int
    length: int


@dataclass(frozen=True)
class GroupPlan:
    """One model's group: how it is laid out, what a rank of it holds, and how long it takes."""

    training: Training
    layout: Layout
    micro_batch: int
    accumulation: int
    memory: RankMemory
    step: StepTime

    @property
    def seconds(self) -> float:
        """Of the whole training."""
        return self.training.steps * self.step.total

    @property
    def tokens_per_second(self) -> float:
        """Of the whole group."""
        return self.training.sequences * self.training.length / self.step.total

    @property
    def work(self) -> Work:
        """For the placement."""
        return Work(self.training.name, self.layout.ranks, self.layout.colocated, self.seconds)


@dataclass(frozen=True)
class StagePlan:
    """Groups that may run side by side, where and when they do, and the seconds that no placement could beat."""

    groups: tuple[GroupPlan, ...]
    placed: tuple[Placed, ...]
    bound: float

    @property
    def seconds(self) -> float:
        """Until the last group ends."""
        return max(one.end for one in self.placed)


def plan_group(shape: ModelShape, training: Training, layout: Layout, cluster: Cluster) -> GroupPlan:
    """One group in a layout that is given. Raises LaunchError if its data ranks cannot share the batch evenly."""
    for problem in layout.batch_problems(training.sequences):
        raise LaunchError(f"{training.name}: {problem}")
    micro, count = layout.micro_batches(training.sequences)
    memory = rank_memory(shape, layout, micro_batch=micro, length=training.length, accumulation=count)
    step = step_time(
        shape,
        layout,
        cluster.gpu,
        sequences=training.sequences,
        length=training.length,
        accumulation=count,
        ranks_per_node=cluster.ranks_per_node,
    )
    return GroupPlan(training, layout, micro, count, memory, step)


def plan_stage(groups: Sequence[GroupPlan], cluster: Cluster) -> StagePlan:
    """Place the groups of one stage. Raises LaunchError if one needs more memory or more ranks than there are."""
    for group in groups:
        _require_memory(group, cluster)
    works = [group.work for group in groups]
    size = {"nodes": cluster.nodes, "ranks_per_node": cluster.ranks_per_node}
    return StagePlan(tuple(groups), tuple(place(works, **size)), lower_bound(works, **size))


def propose(shape: ModelShape, trainings: Sequence[Training], cluster: Cluster, base: Layout) -> tuple[Layout, int]:
    """The one layout and micro-batch with which all these trainings, side by side, end first.

    It keeps the base's precision. Raises LaunchError if no layout fits the GPU's memory.
    """
    longest = max(trainings, key=lambda training: training.steps * training.sequences)
    batches = {training.sequences for training in trainings}
    # Groups as large as leave one for each training are enough; among those, the layouts of each size that do best.
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
            f"{longest.name}: no layout on {cluster.ranks} {cluster.gpu.name} fits {cluster.gpu.memory / 1e9:.0f} GB; "
            "give more or larger GPUs, a smaller model, or offload"
        )
    return best[2], best[3]


def data_parallel_bytes(shape: ModelShape, groups: int, steps: int, width: int) -> float:
    """Bytes that training one model by all groups together would have sent between them: each step, the gradients'
    all-reduce over `groups` replicas, as a ring."""
    return 2.0 * (groups - 1) * shape.parameters * width * steps


def _sizes(cluster: Cluster) -> Iterator[int]:
    """Of groups: powers of 2 within a node, then whole nodes, since launchers give a group no other part of them."""
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
    """The fastest group of a size whose data ranks can share all these batches, the training's own among them."""
    fitting = [
        group
        for layout in _layouts(ranks, cluster, base)
        if not layout.problems(shape, training.length)
        and not any(layout.batch_problems(sequences) for sequences in batches)
        for group in _largest_micro_batch(shape, training, layout, cluster)
    ]
    return min(fitting, key=lambda group: (group.step.total, group.memory.total), default=None)


def _layouts(ranks: int, cluster: Cluster, base: Layout) -> Iterator[Layout]:
    tensor = 1
    while tensor <= min(ranks, cluster.ranks_per_node):
        if ranks % tensor == 0 and cluster.ranks_per_node % tensor == 0:
            for zero in (1, 2, 3) if ranks > tensor else (1,):
                for recompute in ("none", "full"):
                    yield Layout(
                        tensor=tensor,
                        data=ranks // tensor,
                        zero=zero,
                        recompute=recompute,
                        sequence_parallel=tensor > 1,
                        precision=base.precision,
                    )
        tensor *= 2


def _largest_micro_batch(
    shape: ModelShape, training: Training, layout: Layout, cluster: Cluster
) -> Iterator[GroupPlan]:
    """The group with the largest micro-batch that fits the memory, if any does."""
    share = training.sequences // layout.data
    for micro in sorted({min(size, share) for size in _MICRO_BATCHES}, reverse=True):
        group = plan_group(shape, training, layout.model_copy(update={"micro_batch": micro}), cluster)
        if _fits(group, cluster):
            yield group
            return


def _estimated_end(group: GroupPlan, trainings: Sequence[Training], cluster: Cluster) -> float:
    """When the last of the trainings would end in groups like this one: the placement's lower bound, in whole waves."""
    a_sequence = group.step.total / group.training.sequences
    works = sorted((training.steps * training.sequences * a_sequence for training in trainings), reverse=True)
    side_by_side = max(1, cluster.ranks // group.layout.ranks)
    waves = -(-len(works) // side_by_side)
    return max(works[0], sum(works) / side_by_side, waves * works[-1])


def _fits(group: GroupPlan, cluster: Cluster) -> bool:
    return group.memory.total <= _USABLE * cluster.gpu.memory


def _require_memory(group: GroupPlan, cluster: Cluster) -> None:
    if not _fits(group, cluster):
        gpu = cluster.gpu
        raise LaunchError(
            f"{group.training.name}: a rank needs {group.memory.total / 1e9:.1f} GB, and of a {gpu.name}'s "
            f"{gpu.memory / 1e9:.0f} GB {_USABLE:.0%} can be used; raise tensor, data or zero, set recompute: full, or "
            "lower micro_batch"
        )
