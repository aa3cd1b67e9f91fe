"""mpirun's ranks as groups of light commands: who runs what, and what a failing group does to others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.fake_devices import CUDA, H100, fake_machine, nvidia_nodes
from helpers.mpirun import mpirun

from btm_scale.config.launch import MpiConfig
from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.launch import mpi
from btm_scale.launch.mpi import MpiLauncher
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.launch.supervise import GroupCommand
from btm_scale.util.device_query import TorchDevices
from btm_scale.util.devices import Device


def run(folder: Path, ranks: int, **groups: tuple[str, ...]) -> str:
    """Run groups of two ranks; returns what mpirun printed."""
    mpirun()
    commands = [GroupCommand(name, 2, arguments, folder / "train" / name / "log") for name, arguments in groups.items()]
    try:
        MpiLauncher(MpiConfig(ranks=ranks))(commands, lambda states: None)
    finally:
        assert [path.name for path in (folder / "train").iterdir()] in (["mpirun.log"], [])
    return (folder / "train" / "mpirun.log").read_text()


def test_every_command_runs_once_on_each_rank_of_one_group(tmp_path: Path) -> None:
    """Four models, two groups of two, one rank left over."""
    printed = run(tmp_path, 5, a=("--version",), b=("--version",), c=("--version",), d=("--version",))
    assert printed.count("btm-scale 0.") == 8


def test_a_failing_group_does_not_stop_the_others(tmp_path: Path) -> None:
    with pytest.raises(GroupFailed, match="group 'bad' failed"):
        run(tmp_path, 4, bad=("no-such-verb",), a=("--version",), b=("--version",), c=("--version",))
    assert (tmp_path / "train" / "mpirun.log").read_text().count("btm-scale 0.") == 6


def test_too_few_ranks_are_reported(tmp_path: Path) -> None:
    with pytest.raises(GroupFailed, match="A group needs 2 ranks, and mpirun started 1"):
        run(tmp_path, 1, a=("--version",))


def test_the_failure_of_an_earlier_attempt_is_not_reported_again(tmp_path: Path) -> None:
    log = tmp_path / "train" / "a" / "log"
    log.parent.mkdir(parents=True)
    record = {"rank": 0, "ranks": 2, "host": "node7", "time": 1.0, "error": "RuntimeError: of yesterday"}
    log.with_name("log.failed-0.json").write_text(json.dumps(record))
    mpirun()
    with pytest.raises(GroupFailed, match="A group needs 2 ranks"):
        MpiLauncher(MpiConfig(ranks=1))([GroupCommand("a", 2, (), log)], lambda states: None)


def test_a_missing_mpirun_is_reported(tmp_path: Path) -> None:
    launcher = MpiLauncher(MpiConfig(command=("no-such-mpirun",)))
    with pytest.raises(LaunchError, match=r"Set launch\.mpi\.command"):
        launcher([GroupCommand("a", 1, (), tmp_path / "train" / "a" / "log")], lambda states: None)


@pytest.mark.parametrize(("config", "device", "ranks"), [({}, "auto", 8), ({}, "cpu", 96), ({"ranks": 3}, "auto", 3)])
def test_mpirun_starts_a_rank_per_gpu_or_per_core_of_the_cpu(
    config: dict[str, Any], device: Device, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=TorchDevices(CUDA, (H100,) * 8), nodes=nvidia_nodes(*range(8)))
    monkeypatch.setattr(mpi.os, "sched_getaffinity", lambda pid: set(range(96)))
    started: list[Any] = []
    monkeypatch.setattr(mpi, "run_groups_in", lambda pool, commands, on_poll: started.append(pool.take(commands[0])))
    launcher = MpiLauncher(MpiConfig(command=("true",), **config), device)
    launcher([GroupCommand("a", 1, (), tmp_path / "train" / "a" / "log")], lambda states: None)
    [words] = started[0].processes
    assert (words[words.index("-n") + 1], words[-1]) == (str(ranks), device)


@pytest.mark.parametrize(
    ("visible", "taken"),
    [
        ("3", "0"),
        ("GPU-8ab1", "0"),
        ("NoDevFiles", "1"),
        ("", "1"),
        ("0,1,2,3", "1"),
        ("GPU-8ab1,GPU-77c0", "1"),
        (None, "1"),
    ],
)
def test_a_rank_that_is_bound_to_one_gpu_uses_it(
    visible: str | None, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `srun --mpi` with --gpus-per-task, and many sites' wrappers of mpirun, bind it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    started: list[Any] = []
    ended = SimpleNamespace(wait=lambda: 0)
    monkeypatch.setattr(mpi.subprocess, "Popen", lambda words, env, **_: started.append(env) or ended)
    place = mpi._Place(0, 1, rank=1, local_rank=1, address="node7", ports=(20001,), ended=tmp_path)
    mpi._run_rank(GroupCommand("a", 2, (), tmp_path / "a" / "log"), place, 20001, threads=1)
    assert [environment["LOCAL_RANK"] for environment in started] == [taken]


RANK = """#!/bin/bash
trap 'exit 85' TERM USR1
touch begun
while true; do sleep 0.1; done
"""
PLACE = """
import sys
from pathlib import Path
from btm_scale.launch import mpi
from btm_scale.launch.supervise import GroupCommand
sys.executable = "./rank"
place = mpi._Place(0, 1, rank=0, local_rank=0, address="127.0.0.1", ports=(20001,), ended=Path("ended"))
sys.exit(mpi._run_rank(GroupCommand("a", 1, (), Path("log")), place, 20001, threads=1))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_an_mpi_rank_forwards_a_stop_signal(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "rank").write_text(RANK)
    (tmp_path / "rank").chmod(0o755)
    process = subprocess.Popen([sys.executable, "-c", PLACE], cwd=tmp_path)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == REQUEUE
