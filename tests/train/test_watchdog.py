"""Which processes a watchdog takes for peers of its rank."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from btm_scale.train import watchdog


def test_a_rank_on_another_host_of_the_same_name_is_not_a_local_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cloned machines may all be named localhost; the same process id here is another process."""

    def gather(processes: list[Any], own: tuple[str, int]) -> None:
        assert own[0] != socket.gethostname()
        processes[:] = [own, (own[0], 4000), (f"{own[0]} of another boot", 5000)]

    monkeypatch.setattr(watchdog.dist, "all_gather_object", gather)
    group: Any = SimpleNamespace(size=3)
    assert watchdog._processes_of_this_host(group) == {1: 4000}
    assert os.getpid() not in watchdog._processes_of_this_host(group).values()
