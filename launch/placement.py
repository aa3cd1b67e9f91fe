"""Who runs where and when: groups of unlike size on nodes, packed so that the last one ends as early as can be."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from btm_scale.errors import LaunchError


@dataclass(frozen=True)
class Work:
    """One group's work: `ranks`, of which every `colocated` share a node, for `seconds`."""

    name: str
    ranks: int
    colocated: int
    seconds: float


@dataclass(frozen=True)
class Placed:
    """Where a group runs: `nodes` holds (node, ranks there); it runs from `start` to `end`, in seconds."""

    work: Work
    nodes: tuple[tuple[int, int], ...]
    start: float

    @property
    def end(self) -> float:
        """Seconds."""
        return self.start + self.work.seconds


def place(works: Sequence[Work], *, nodes: int, ranks_per_node: int) -> list[Placed]:
    """Longest first, each as soon as there is room (list scheduling: Graham 1969).

    A group that fits a node stays in one; a larger one takes whole nodes. Raises LaunchError if a group can never fit.
    """
    for work in works:
        _check(work, nodes, ranks_per_node)
    room = _Room(nodes, ranks_per_node)
    waiting = sorted(works, key=lambda work: (-work.seconds, -work.ranks, work.name))
    ends: list[tuple[float, int, tuple[tuple[int, int], ...]]] = []
    placed: list[Placed] = []
    now = 0.0
    while waiting:
        left = []
        smallest_refused = float("inf")
        for work in waiting:
            found = room.take(work.ranks) if work.ranks < smallest_refused else None
            if found is None:
                smallest_refused = min(smallest_refused, work.ranks)
                left.append(work)
                continue
            placed.append(Placed(work, found, now))
            heapq.heappush(ends, (now + work.seconds, len(placed), found))
        waiting = left
        if waiting:
            now = ends[0][0]
            while ends and ends[0][0] <= now:
                room.give_back(heapq.heappop(ends)[2])
    return placed


def lower_bound(works: Sequence[Work], *, nodes: int, ranks_per_node: int) -> float:
    """Seconds that no placement can beat: all work over all ranks, or the longest group."""
    total = sum(work.ranks * work.seconds for work in works)
    return max([total / (nodes * ranks_per_node), *(work.seconds for work in works)])


def share_out(works: Sequence[Work], groups: int) -> list[list[Work]]:
    """`groups` lists of nearly equal time, longest first: for groups that are fixed before any work begins."""
    lists: list[list[Work]] = [[] for _ in range(groups)]
    loads = [(0.0, number) for number in range(groups)]
    for work in sorted(works, key=lambda work: (-work.seconds, work.name)):
        load, number = heapq.heappop(loads)
        lists[number].append(work)
        heapq.heappush(loads, (load + work.seconds, number))
    return lists


class _Room:
    """Free ranks of every node, by how many are free."""

    def __init__(self, nodes: int, ranks_per_node: int) -> None:
        self._per_node = ranks_per_node
        self._free = dict.fromkeys(range(nodes), ranks_per_node)
        self._with: dict[int, dict[int, None]] = defaultdict(dict)  # ordered sets of nodes
        self._with[ranks_per_node] = dict.fromkeys(range(nodes))

    def take(self, ranks: int) -> tuple[tuple[int, int], ...] | None:
        if ranks <= self._per_node:
            # The node that it fills best.
            for free in range(ranks, self._per_node + 1):
                if self._with[free]:
                    return self._use([(next(iter(self._with[free])), ranks)])
            return None
        whole, rest = divmod(ranks, self._per_node)
        empty = self._with[self._per_node]
        if len(empty) < whole + bool(rest):
            return None
        chosen = [node for node, _ in zip(empty, range(whole + bool(rest)), strict=False)]
        return self._use([(node, min(self._per_node, ranks - i * self._per_node)) for i, node in enumerate(chosen)])

    def give_back(self, used: tuple[tuple[int, int], ...]) -> None:
        for node, ranks in used:
            self._set(node, self._free[node] + ranks)

    def _use(self, chosen: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        for node, ranks in chosen:
            self._set(node, self._free[node] - ranks)
        return tuple(chosen)

    def _set(self, node: int, free: int) -> None:
        del self._with[self._free[node]][node]
        self._free[node] = free
        self._with[free][node] = None


def _check(work: Work, nodes: int, ranks_per_node: int) -> None:
    if work.colocated > ranks_per_node or (work.ranks > ranks_per_node and ranks_per_node % work.colocated):
        raise LaunchError(
            f"{work.name}: {work.colocated} ranks that share a node do not fit nodes of {ranks_per_node} GPUs; choose "
            "a tensor degree that divides their number"
        )
    if work.ranks > nodes * ranks_per_node:
        raise LaunchError(
            f"{work.name} needs {work.ranks} ranks, and {nodes} nodes of {ranks_per_node} have "
            f"{nodes * ranks_per_node}; give more nodes, or a smaller layout"
        )
