"""Visible cores, how threads wait for one another, and how long they wait for a core."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from btm_scale.cli.app import main
from btm_scale.util.cores import CoreWaits, visible_cores, wait_passively


@pytest.mark.parametrize(("quota", "cores"), [("max", 8), ("250000", 2), ("50000", 1), ("6400000", 8)])
def test_cores_are_those_of_the_affinity_mask_or_of_a_lower_quota(
    quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "sys/fs/cgroup/job").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/job/cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr("os.getloadavg", lambda: pytest.fail("the number of threads must not depend on the load"))
    assert visible_cores(tmp_path) == cores


def test_the_command_lets_waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "")  # so that what the command sets is undone
        monkeypatch.delenv(name)
    main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_how_threads_wait_stays_what_the_environment_says(name: str) -> None:
    environment = {name: "7"}
    wait_passively(environment)
    assert environment == {name: "7"}


def test_waiting_for_a_core_is_measured_over_all_threads_since_the_last_call(tmp_path: Path) -> None:
    def spend(thread: str, ran: int, waited: int) -> None:
        (tmp_path / "proc/self/task" / thread).mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/task" / thread / "schedstat").write_text(f"{ran} {waited} 9\n")

    spend("1", 1_000, 9_000)
    waits = CoreWaits(tmp_path)
    spend("1", 1_200, 9_100)
    spend("2", 100, 500)
    assert waits.fraction() == pytest.approx(600 / 900)
    assert waits.fraction() is None
    assert CoreWaits(tmp_path / "none").fraction() is None
