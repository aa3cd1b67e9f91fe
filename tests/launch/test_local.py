"""Room for groups on one machine."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from helpers.fake_devices import CUDA, H100, MI300X, MIG, ROCM, amd_nodes, fake_machine, nvidia_nodes

from btm_scale.errors import LaunchError
from btm_scale.launch.local import LocalPool
from btm_scale.launch.supervise import GroupCommand
from btm_scale.util.device_query import TorchDevices


def command(name: str, ranks: int) -> GroupCommand:
    return GroupCommand(name, ranks, ("train",), Path("log"))


def gpus_of(pool: LocalPool, name: str, ranks: int) -> list[str] | None:
    """The GPUs passed to the launcher; None if there was no room."""
    start = pool.take(command(name, ranks))
    if start is None:
        return None
    world = next(word for word in start.processes[0] if word.startswith("--world_info="))
    return list(json.loads(base64.urlsafe_b64decode(world.partition("=")[2]))["localhost"])


def test_groups_that_run_at_once_have_different_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    four = TorchDevices(CUDA, (H100,) * 4)
    visible = {"CUDA_VISIBLE_DEVICES": "2,3, 5,GPU-8ab1"}
    fake_machine(monkeypatch, tmp_path, torch=four, nodes=nvidia_nodes(*range(8)), **visible)
    pool = LocalPool(slots=4, threads=1)
    assert gpus_of(pool, "a", 2) == ["2", "3"]
    assert gpus_of(pool, "b", 1) == ["5"]
    assert gpus_of(pool, "c", 2) is None
    pool.give_back("a")
    assert gpus_of(pool, "c", 2) == ["2", "3"]
    with pytest.raises(LaunchError, match="'d' has 5 ranks, and this machine has 4 visible GPUs"):
        pool.take(command("d", 5))


def test_gpus_that_a_container_has_renumbered_are_used_under_their_new_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=TorchDevices(CUDA, (H100,) * 2), nodes=nvidia_nodes(2, 3))
    pool = LocalPool(slots=2, threads=1)
    assert [gpus_of(pool, name, 1) for name in "ab"] == [["0"], ["1"]]


def test_groups_on_amd_are_given_their_gpus_by_hips_variable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = TorchDevices(ROCM, (MI300X,) * 8)
    fake_machine(monkeypatch, tmp_path, torch=eight, nodes=amd_nodes(tmp_path, 8))
    pool = LocalPool(slots=8, threads=1)
    starts = [pool.take(command(name, 2)) for name in "abcd"]
    assert [start and start.environment["HIP_VISIBLE_DEVICES"] for start in starts] == ["0,1", "2,3", "4,5", "6,7"]
    assert all(start and "DS_ACCELERATOR" not in start.environment for start in starts)
    assert pool.take(command("e", 1)) is None


def test_each_mig_instance_trains_a_group_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = TorchDevices(CUDA, (MIG,))
    fake_machine(monkeypatch, tmp_path, torch=one, nodes=nvidia_nodes(0), mig=("MIG-1", "MIG-2"))
    pool = LocalPool(slots=2, threads=1)
    assert [gpus_of(pool, name, 1) for name in "ab"] == [["MIG-1"], ["MIG-2"]]
    with pytest.raises(LaunchError, match="'c' has 2 ranks, and this machine's GPUs are MIG instances"):
        pool.take(command("c", 2))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_without_gpus_only_the_slots_count(hidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eight = TorchDevices(CUDA, (H100,) * 8)
    fake_machine(monkeypatch, tmp_path, torch=eight, nodes=nvidia_nodes(0), CUDA_VISIBLE_DEVICES=hidden)
    pool = LocalPool(slots=1, threads=1)
    assert gpus_of(pool, "a", 2) == ["-1", "-1"]  # so that DeepSpeed's launcher does not show them again
    assert pool.take(command("b", 1)) is None
    pool.give_back("a")
    start = pool.take(command("b", 8))
    assert start is not None
    assert start.environment["DS_ACCELERATOR"] == start.environment["BTM_SCALE_DEVICE"] == "cpu"


def test_a_machine_whose_gpus_torch_cannot_use_starts_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, tmp_path, torch=TorchDevices("CPU"), nodes=nvidia_nodes(0))
    with pytest.raises(LaunchError, match="this is a CPU build of torch"):
        LocalPool(slots=1, threads=1)
    assert gpus_of(LocalPool(1, 1, "cpu"), "a", 1) == ["-1"]
