"""Which process of a merge merges which units."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from btm_scale.checkpoint.merge.plan import MergePlan, Unit

# Times are in those of bytes that are copied.
_START_BYTES = 3 << 30  # to import torch
_HASHED_BYTE = 2
_ADDED_BYTE = 1.25
_LONGER = 1.1  # than with the best number of processes that import torch, for fewer of them


@dataclass(frozen=True)
class Shares:
    """Shares units out to processes, so that all take about the same time.

    `by_torch` are the tensors for which a process first imports torch, none if every process has it already. The
    hashes of the units `hashed` are known. `direct`: NumPy's part is written directly. Processes then do not wait for
    each other, and each gets copies and sums, so that the disk writes the ones while the others are computed.
    """

    plan: MergePlan
    by_torch: Set[str] = frozenset()
    hashed: Set[Unit] = frozenset()
    direct: bool = False

    def of(self, units: Sequence[Unit], size: int) -> list[list[Unit]]:
        """Return the units of each of `size` processes, in their order."""
        costs = {unit: self.cost(unit) for unit in units}
        first = [unit for unit in units if unit.name in self.by_torch]
        rest = [unit for unit in units if unit.name not in self.by_torch]
        start = _START_BYTES if first else 0
        adding, total = sum(costs[unit] for unit in first), sum(costs.values())
        # The time of those with torch, and that of all processes together. Torch takes memory in each that imports it.
        longest = {count: max(start + adding / count, (total + start * count) / size) for count in range(1, size + 1)}
        with_torch = next(count for count, time in longest.items() if time <= _LONGER * min(longest.values()))
        load: list[float] = [start if rank < with_torch else 0 for rank in range(size)]
        full = (total + sum(load)) / size
        given: list[list[Unit]] = [[] for _ in load]
        for group, ranks in ((first, range(with_torch)), (rest, range(size))):
            for unit in sorted(group, key=costs.__getitem__, reverse=True):
                router = self.plan.router_of(unit.name)
                own = ranks if router is None else ranks[: router.at_once]
                rank = min(own, key=load.__getitem__)
                if not self.direct:
                    # One process after the other: those with sums write little while the others copy, and of several
                    # processes that write to one file all but one wait.
                    rank = next((rank for rank in own if load[rank] + costs[unit] / 2 <= full), rank)
                load[rank] += costs[unit]
                given[rank].append(unit)
        place = {unit: i for i, unit in enumerate(units)}
        return [sorted(own, key=place.__getitem__) for own in given]

    def cost(self, unit: Unit) -> float:
        """Return the time that a unit takes."""
        if (router := self.plan.router_of(unit.name)) is not None:
            return router.bytes_of_gate
        written = (unit.stop - unit.start) * self.plan.specs[unit.name].itemsize
        read = 0 if self.plan.copies(unit.name) else len(self.plan.how(unit.name).models) * written
        return written + _ADDED_BYTE * read + (0 if unit in self.hashed else _HASHED_BYTE * written)
