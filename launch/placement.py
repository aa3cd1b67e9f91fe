"""Placement of groups of different sizes on nodes, so that the last one ends early."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from btm_scale.errors import LaunchError
from btm_scale.launch.room import Room, Share


@dataclass(frozen=True)
class Work:
    """The work of one group: `ranks`, of which each `colocated` share a node, for `seconds`."""

    name: str
    ranks: int
    colocated: int
    seconds: float


@dataclass(frozen=True)
class Placed:
    """Where a group runs: `nodes` has (node, ranks on it); it runs from `start` to `end`, in seconds."""

    work: Work
    nodes: tuple[tuple[int, int], ...]
    start: float

    @property
    def end(self) -> float:
        """When the group ends, in seconds."""
        return self.start + self.work.seconds


def place(works: Sequence[Work], *, nodes: int, ranks_per_node: int) -> list[Placed]:
    """Return where and when each group runs: longest first, each as soon as there is room (Graham 1969).

    A group that fits a node gets a single one; a larger one gets complete nodes. Raises LaunchError if a group can
    never fit.
    """
    for work in works:
        _check(work, nodes, ranks_per_node)
    room = Room({node: range(ranks_per_node) for node in range(nodes)})
    waiting = sorted(works, key=lambda work: (-work.seconds, -work.ranks, work.name))
    ends: list[tuple[float, int, tuple[Share[int, int], ...]]] = []
    placed: list[Placed] = []
    now = 0.0
    while waiting:
        left = []
        smallest_refused = float("inf")
        for work in waiting:
            shares = room.take(work.ranks, whole_hosts=True) if work.ranks < smallest_refused else None
            if shares is None:
                smallest_refused = min(smallest_refused, work.ranks)
                left.append(work)
                continue
            placed.append(Placed(work, tuple((share.host, len(share.slots)) for share in shares), now))
            heapq.heappush(ends, (now + work.seconds, len(placed), shares))
        waiting = left
        if waiting:
            now = ends[0][0]
            while ends and ends[0][0] <= now:
                room.give_back(heapq.heappop(ends)[2])
    return placed


def lower_bound(works: Sequence[Work], *, nodes: int, ranks_per_node: int) -> float:
    """Return a lower bound in seconds for any placement: all work over all ranks, or the longest group."""
    total = sum(work.ranks * work.seconds for work in works)
    return max([total / (nodes * ranks_per_node), *(work.seconds for work in works)])


def share_out(works: Sequence[Work], groups: int) -> list[list[Work]]:
    """Return the work of each of `groups` fixed groups: lists of nearly equal time, longest first."""
    lists: list[list[Work]] = [[] for _ in range(groups)]
    loads = [(0.0, 0, number) for number in range(groups)]
    for work in sorted(works, key=lambda work: (-work.seconds, work.name)):
        load, count, number = heapq.heappop(loads)
        lists[number].append(work)
        # Models that take no step take the time of a start, and are distributed by their number.
        heapq.heappush(loads, (load + work.seconds, count + 1, number))
    return lists


def _check(work: Work, nodes: int, ranks_per_node: int) -> None:
    if work.colocated > ranks_per_node or (work.ranks > ranks_per_node and ranks_per_node % work.colocated):
        raise LaunchError(
            f"{work.name}: {work.colocated} ranks that share a node do not fit nodes of {ranks_per_node} GPUs. Choose "
            "a tensor degree that divides the GPUs of a node."
        )
    if work.ranks > nodes * ranks_per_node:
        raise LaunchError(
            f"{work.name} needs {work.ranks} ranks, and {nodes} nodes of {ranks_per_node} have "
            f"{nodes * ranks_per_node}. Use more nodes, or a smaller layout."
        )
