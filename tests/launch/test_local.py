"""Room for groups on one machine."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from btm_scale.errors import LaunchError
from btm_scale.launch.local import LocalPool, visible_gpus
from btm_scale.launch.supervise import GroupCommand


def command(name: str, ranks: int) -> GroupCommand:
    return GroupCommand(name, ranks, ("train",), Path("log"))


def gpus_of(pool: LocalPool, name: str, ranks: int) -> list[str] | None:
    """The GPUs passed to the launcher; None if there was no room."""
    start = pool.take(command(name, ranks))
    if start is None:
        return None
    world = next(word for word in start.processes[0] if word.startswith("--world_info="))
    return list(json.loads(base64.urlsafe_b64decode(world.partition("=")[2]))["localhost"])


def test_groups_that_run_at_once_have_different_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3, 5,GPU-8ab1")
    pool = LocalPool(slots=4, threads=1)
    assert gpus_of(pool, "a", 2) == ["2", "3"]
    assert gpus_of(pool, "b", 1) == ["5"]
    assert gpus_of(pool, "c", 2) is None
    pool.give_back("a")
    assert gpus_of(pool, "c", 2) == ["2", "3"]
    with pytest.raises(LaunchError, match="'d' has 5 ranks, and this machine has 4 visible GPUs"):
        pool.take(command("d", 5))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_without_gpus_only_the_slots_count(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert visible_gpus() == []
    pool = LocalPool(slots=1, threads=1)
    start = pool.take(command("a", 8))
    assert start is not None
    assert start.environment["DS_ACCELERATOR"] == "cpu"
    assert pool.take(command("b", 1)) is None
