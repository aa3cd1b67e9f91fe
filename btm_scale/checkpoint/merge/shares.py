"""Which process of a merge merges which units."""

from __future__ import annotations

from btm_scale.checkpoint.merge.numpy_runner import needs_no_sums
from btm_scale.checkpoint.merge.plan import MergePlan, Unit

_START_BYTES = 1 << 30  # that a process copies in the second in which it would import torch
_SUM_BYTES = 3  # read by a process that adds up in the time of copying one


def mostly_copies(plan: MergePlan) -> bool:
    """Whether most of the output is copied from one of the models, or drawn."""
    copied = sum(spec.nbytes for name, spec in plan.specs.items() if needs_no_sums(plan, name))
    return 2 * copied > sum(spec.nbytes for spec in plan.specs.values())


def shares(plan: MergePlan, size: int, *, torch_starts: bool) -> list[list[Unit]]:
    """Return the units of each of `size` processes, in the order of the plan, so that all take about the same time.

    Every process computes the same. If `torch_starts`, a process imports torch for its first unit that is a sum, so
    as few processes as possible get these.
    """
    units, ranks = plan.units, range(size)
    costs = {unit: _cost(plan, unit) for unit in units}
    start = _START_BYTES if torch_starts else 0
    fair = (sum(costs.values()) + start) / size
    given: list[list[Unit]] = [[] for _ in ranks]
    load, with_torch = [0] * size, {i for i in ranks if not torch_starts}
    copies = [unit for unit in units if needs_no_sums(plan, unit.name)]
    for unit in [unit for unit in units if not needs_no_sums(plan, unit.name)]:
        ready = [i for i in sorted(with_torch) if load[i] < fair]
        if not ready and len(with_torch) < size:
            ready = [len(with_torch)]
            load[ready[0]] = start
        rank = min(ready or ranks, key=load.__getitem__)
        with_torch.add(rank)
        load[rank] += costs[unit]
        given[rank].append(unit)
    for unit in copies:
        rank = min(ranks, key=load.__getitem__)
        load[rank] += costs[unit]
        given[rank].append(unit)
    place = {unit: i for i, unit in enumerate(units)}
    return [sorted(own, key=place.__getitem__) for own in given]


def _cost(plan: MergePlan, unit: Unit) -> int:
    """Return how many bytes are copied in the time that a unit takes."""
    written = (unit.stop - unit.start) * plan.specs[unit.name].itemsize
    read = 0 if needs_no_sums(plan, unit.name) else len(plan.how(unit.name).models) * written
    return written + read // _SUM_BYTES
