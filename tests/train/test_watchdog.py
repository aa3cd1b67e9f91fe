"""Which processes the watches of a rank take for its peers."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from btm_scale.train import watchdog


def test_a_rank_of_another_host_of_the_same_name_is_no_process_of_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cloned machines may all be called localhost; what has that rank's number here is another process."""

    def gather(everyone: list[Any], own: tuple[str, int]) -> None:
        assert own[0] != socket.gethostname()
        everyone[:] = [own, (own[0], 4000), (f"{own[0]} of another boot", 5000)]

    monkeypatch.setattr(watchdog.dist, "all_gather_object", gather)
    group: Any = SimpleNamespace(size=3)
    assert watchdog._processes_of_this_host(group) == {1: 4000}
    assert os.getpid() not in watchdog._processes_of_this_host(group).values()
