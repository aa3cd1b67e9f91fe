"""The CPU cores of this process: how many it may use, how threads wait for one another, and for a core.

How many threads a model trains with depends on the config and the visible cores, never on the load: the number decides
the order of sums.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# What libgomp, libomp and Intel's OpenMP read when they are loaded.
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# For libgomp, about 0.06 milliseconds: longer than most waits between two operations of a step, and much shorter
# than the time for which the kernel runs another process.
_SPINS = "3000"


def visible_cores(root: Path = Path("/")) -> int:
    """Return how many threads can run at once: the cores of the affinity mask, or fewer if a cgroup limits the CPU."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(root)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the cgroups' CPU quota, in CPUs; None without a limit, or if it cannot be read."""
    quotas = []
    for folder in cgroup_folders("cpu", root):
        try:
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            elif (folder / "cpu.cfs_quota_us").exists():
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            else:
                continue
            if quota not in ("max", "-1"):
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(quotas, default=None)


def cgroup_folders(controller: str, root: Path) -> Iterator[Path]:
    """Yield this process's cgroup and its ancestors, of version 1 or 2. In a container, the lowest are not mounted."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / path.lstrip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(top) and each.is_dir())


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep while they wait for one another, unless the environment says how they wait.

    By default they spin. Beside other work, a spinning thread takes the core that the thread it waits for needs, and a
    step takes many times as long. Must be called before torch is imported.
    """
    if not any(name in environment for name in _WAIT_VARIABLES):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment["GOMP_SPINCOUNT"] = _SPINS


class CoreWaits:
    """How much of the time this process's threads wait for a core, although they could run."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._tasks = root / "proc/self/task"
        self._last = self._times()

    def fraction(self) -> float | None:
        """Return waiting time by waiting and running time of all threads since the last call; None if unknown."""
        before, self._last = self._last, self._times()
        ran = waited = 0
        for thread, (ran_now, waited_now) in self._last.items():
            ran_then, waited_then = before.get(thread, (0, 0))
            ran, waited = ran + ran_now - ran_then, waited + waited_now - waited_then
        return waited / (ran + waited) if ran + waited > 0 else None

    def _times(self) -> dict[str, tuple[int, int]]:
        """Return for how many nanoseconds each thread ran, and waited to run; empty if the kernel does not count."""
        times = {}
        with contextlib.suppress(OSError):
            for task in self._tasks.iterdir():
                with contextlib.suppress(OSError, ValueError, IndexError):  # it may have ended
                    words = (task / "schedstat").read_text().split()
                    times[task.name] = int(words[0]), int(words[1])
        return times
