"""Who runs where and when."""

from __future__ import annotations

import itertools
import random

import pytest

from btm_scale.errors import LaunchError
from btm_scale.launch.placement import Placed, Work, lower_bound, place, share_out


def works(*sizes: tuple[int, float], colocated: int = 1) -> list[Work]:
    return [Work(f"w{i}", ranks, colocated, seconds) for i, (ranks, seconds) in enumerate(sizes)]


def end(placed: list[Placed]) -> float:
    return max(one.end for one in placed)


def ranks_in_use(placed: list[Placed], node: int, time: float) -> int:
    return sum(ranks for one in placed for at, ranks in one.nodes if at == node and one.start <= time < one.end)


@pytest.mark.parametrize("seed", range(5))
def test_no_node_ever_has_more_ranks_than_slots_and_no_small_group_spans_two(seed: int) -> None:
    draw = random.Random(seed)
    given = works(*((draw.choice([1, 2, 4, 8, 16, 24]), draw.uniform(1, 10)) for _ in range(60)))
    placed = place(given, nodes=5, ranks_per_node=8)
    assert sorted(one.work.name for one in placed) == sorted(work.name for work in given)
    for one in placed:
        assert sum(ranks for _, ranks in one.nodes) == one.work.ranks
        assert len(one.nodes) == max(1, one.work.ranks // 8)
    for time, node in itertools.product({one.start for one in placed}, range(5)):
        assert ranks_in_use(placed, node, time) <= 8
    bound = lower_bound(given, nodes=5, ranks_per_node=8)
    assert bound <= end(placed) <= 1.25 * bound


def test_experts_of_different_sizes_end_together_if_possible() -> None:
    # 3 + 3 + 2 + 2 + 2 hours on two nodes: longest first finds 3 + 3 | 2 + 2 + 2.
    placed = place(works((8, 2), (8, 3), (8, 2), (8, 3), (8, 2)), nodes=2, ranks_per_node=8)
    assert end(placed) == 7 or end(placed) == 6
    assert end(place(works((4, 6), (2, 6), (1, 6), (1, 6)), nodes=1, ranks_per_node=8)) == 6


def test_fewer_nodes_than_experts_run_in_waves() -> None:
    placed = place(works(*[(8, 1.0)] * 10), nodes=4, ranks_per_node=8)
    assert sorted(one.start for one in placed) == [0] * 4 + [1] * 4 + [2] * 2
    assert end(placed) == 3


def test_a_long_group_starts_first_and_short_ones_fill_in_beside_it() -> None:
    placed = {one.work.name: one for one in place(works((4, 1), (8, 10), (4, 1)), nodes=2, ranks_per_node=8)}
    assert placed["w1"].start == 0
    assert placed["w0"].start == placed["w2"].start == 0
    assert placed["w0"].nodes == placed["w2"].nodes


def test_groups_that_can_never_fit_are_reported() -> None:
    with pytest.raises(LaunchError, match="w0 needs 32 ranks, and 2 nodes of 8 have 16"):
        place(works((32, 1)), nodes=2, ranks_per_node=8)
    with pytest.raises(LaunchError, match="3 ranks that share a node do not fit nodes of 8"):
        place(works((12, 1), colocated=3), nodes=2, ranks_per_node=8)
    with pytest.raises(LaunchError, match="16 ranks that share a node"):
        place(works((16, 1), colocated=16), nodes=2, ranks_per_node=8)


def test_work_is_divided_evenly_over_fixed_groups() -> None:
    lists = share_out(works((2, 5), (2, 4), (2, 3), (2, 3), (2, 3)), 2)
    assert sorted(sum(work.seconds for work in own) for own in lists) == [8, 10]


def test_work_that_takes_no_time_is_divided_by_number() -> None:
    assert [len(own) for own in share_out(works(*[(1, 0)] * 6), 3)] == [2, 2, 2]
