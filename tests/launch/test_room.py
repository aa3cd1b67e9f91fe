"""Which group gets which slots."""

from __future__ import annotations

from btm_scale.launch.room import Room, Share


def test_a_group_stays_on_the_host_that_it_fills_best() -> None:
    room = Room({"big": range(8), "small": range(2)})
    assert room.take(2) == (Share("small", (0, 1)),)
    assert room.take(6, 2) == (Share("big", (0, 1, 2, 3, 4, 5)),)
    assert room.take(4) is None
    room.give_back((Share("big", (0, 1, 2, 3, 4, 5)),))
    assert room.take(4) == (Share("big", (0, 1, 2, 3)),)


def test_freed_slots_are_taken_in_the_order_of_the_host() -> None:
    room = Room({"here": ["2", "3", "5", "GPU-8ab1"]})
    first, second = room.take(2), room.take(1)
    assert (first, second) == ((Share("here", ("2", "3")),), (Share("here", ("5",)),))
    assert first is not None
    room.give_back(first)
    assert room.take(3) == (Share("here", ("2", "3", "GPU-8ab1")),)


def test_colocated_ranks_never_span_two_hosts() -> None:
    room = Room({"a": range(3), "b": range(3)})
    assert room.could_take(4, 2)
    assert not room.could_take(6, 2)
    assert room.take(4, 2) == (Share("a", (0, 1)), Share("b", (0, 1)))
    assert room.could_take(4, 2)
    assert room.take(4, 2) is None


def test_a_group_of_whole_hosts_shares_none_of_them() -> None:
    room = Room({node: range(4) for node in range(3)})
    assert room.take(1, whole_hosts=True) == (Share(0, (0,)),)
    assert room.take(6) == (Share(1, (0, 1, 2, 3)), Share(2, (0, 1)))
    assert room.take(3, whole_hosts=True) == (Share(0, (1, 2, 3)),)
    room = Room({node: range(4) for node in range(3)})
    room.take(1)
    assert room.take(12, whole_hosts=True) is None
    assert room.take(8, whole_hosts=True) == (Share(1, (0, 1, 2, 3)), Share(2, (0, 1, 2, 3)))
    assert room.take(4, whole_hosts=True) is None
    assert room.take(4) is None
