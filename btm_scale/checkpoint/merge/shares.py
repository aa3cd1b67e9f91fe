"""Which process of a merge merges which units."""

from __future__ import annotations

from collections.abc import Sequence

from btm_scale.checkpoint.merge.numpy_runner import is_copied_or_drawn
from btm_scale.checkpoint.merge.plan import MergePlan, Unit

_START_BYTES = 1 << 30  # copied in the time that importing torch takes
_SUMMED_PER_COPIED = 3  # bytes read for a sum in the time in which one is copied
_LONGER = 1.1  # than with the best number of processes that import torch, for fewer of them


def mostly_copies(plan: MergePlan) -> bool:
    """Whether most of the output is copied from one of the models, or drawn."""
    copied = sum(spec.nbytes for name, spec in plan.specs.items() if is_copied_or_drawn(plan, name))
    return 2 * copied > sum(spec.nbytes for spec in plan.specs.values())


def shares(plan: MergePlan, units: Sequence[Unit], size: int, *, torch_starts: bool) -> list[list[Unit]]:
    """Return the units of each of `size` processes, in their order, so that all take about the same time.

    If `torch_starts`, a process imports torch for its first sum, so only as many get sums as are needed.
    """
    costs = {unit: _cost(plan, unit) for unit in units}
    sums = [unit for unit in units if not is_copied_or_drawn(plan, unit.name)]
    copies = [unit for unit in units if is_copied_or_drawn(plan, unit.name)]
    start = _START_BYTES if torch_starts and sums else 0
    adding, total = sum(costs[unit] for unit in sums), sum(costs.values())
    # The time of those with torch, and that of all processes together. Torch takes memory in each that imports it.
    longest = {count: max(start + adding / count, (total + start * count) / size) for count in range(1, size + 1)}
    with_torch = next(count for count, time in longest.items() if time <= _LONGER * min(longest.values()))
    load = [start if rank < with_torch else 0 for rank in range(size)]
    given: list[list[Unit]] = [[] for _ in load]
    for group, ranks in ((sums, range(with_torch if start else size)), (copies, range(size))):
        for unit in group:
            rank = min(ranks, key=load.__getitem__)
            load[rank] += costs[unit]
            given[rank].append(unit)
    place = {unit: i for i, unit in enumerate(units)}
    return [sorted(own, key=place.__getitem__) for own in given]


def _cost(plan: MergePlan, unit: Unit) -> int:
    """Return how many bytes are copied in the time that a unit takes."""
    written = (unit.stop - unit.start) * plan.specs[unit.name].itemsize
    read = 0 if is_copied_or_drawn(plan, unit.name) else len(plan.how(unit.name).models) * written
    return written + read // _SUMMED_PER_COPIED
