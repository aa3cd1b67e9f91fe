"""Watchdogs of a group: it ends when a rank dies or a step hangs.

The ranks of one host watch each other's processes. A rank that dies on another host shows as a hanging step, or is
noticed by the launcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import select
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from btm_scale.config.training import HealthConfig
from btm_scale.distributed.group import ExpertGroup

logger = logging.getLogger(__name__)

# Time for the launcher to learn of a rank's own error before the others end too.
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.5
# Time for the other ranks to dump their stacks.
_DUMP_SECONDS = 3.0
_LEAST_STEPS = 5
# The first steps may compile and tune.
_FIRST_STEPS_PATIENCE = 10
_BETWEEN_STEPS_PATIENCE = 4


class PeerWatch:
    """Ends this rank when another rank on its host dies. Exit this context before the group ends cleanly."""

    def __init__(self, group: ExpertGroup) -> None:
        self._peers = _processes_of_this_host(group)
        self._left = threading.Event()

    def __enter__(self) -> Self:
        descriptors = {}
        for rank, pid in self._peers.items():
            with contextlib.suppress(ProcessLookupError):
                descriptors[os.pidfd_open(pid)] = rank
        if descriptors:
            threading.Thread(target=self._watch, args=(descriptors,), daemon=True, name="peer-watch").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    def _watch(self, descriptors: dict[int, int]) -> None:
        ended: list[int] = []
        while not ended and not self._left.is_set():
            ended = select.select(list(descriptors), [], [], _POLL_SECONDS)[0]
        if not self._left.wait(_GRACE_SECONDS):
            logger.error("rank %d of this group has died; this rank ends too", descriptors[ended[0]])
            os._exit(1)


class HangWatch:
    """Ends the group when a step takes far longer than usual, after every rank has dumped its stacks."""

    def __init__(self, group: ExpertGroup, config: HealthConfig) -> None:
        self._config = config
        self._peers = _processes_of_this_host(group)
        self._seconds: deque[float] = deque(maxlen=50)
        self._since: float | None = None
        self._times = 1
        self._waits = False
        self._ends = False
        self._left = threading.Event()

    def __enter__(self) -> Self:
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
        threading.Thread(target=self._watch, daemon=True, name="hang-watch").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time the enclosed step."""
        self._since = time.monotonic()
        yield
        self._stay_if_it_ends()
        self._seconds.append(time.monotonic() - self._since)
        self._since = None

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """Time work between steps, such as saving. It may take longer than a step and does not count as one."""
        self._times, self._since = _BETWEEN_STEPS_PATIENCE, time.monotonic()
        yield
        self._stay_if_it_ends()
        self._times, self._since = 1, None

    def progress(self) -> None:
        """Note that the work between two steps advances, such as another tensor of a checkpoint."""
        if self._since is not None:
            self._since = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Do not time the enclosed wait for other ranks, whose own watchdogs time what they do.

        A suspended rank's watchdog does not run, so the wait is timed while a rank on this host is suspended.
        """
        since, self._since, self._waits = self._since, None, True
        try:
            yield
        finally:
            self._waits = False
            self._since = None if since is None else time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds that the current step, or the current work between steps, may take."""
        if len(self._seconds) < _LEAST_STEPS:
            return _FIRST_STEPS_PATIENCE * self._config.patience
        return self._times * max(self._config.patience, self._config.hang * statistics.median(self._seconds))

    def _watch(self) -> None:
        suspended_since: float | None = None
        while not self._left.wait(_POLL_SECONDS):
            if self._waits and any(map(_is_suspended, self._peers.values())):
                suspended_since = suspended_since or time.monotonic()
            else:
                suspended_since = None
            since = suspended_since or self._since
            if since is not None and time.monotonic() - since > self.limit:
                self._end(time.monotonic() - since)

    def _stay_if_it_ends(self) -> None:
        """Take no further step in a group that ends, though a suspended rank has been resumed to dump its stacks."""
        while self._ends:
            time.sleep(_POLL_SECONDS)

    def _end(self, seconds: float) -> None:
        self._ends = True
        try:
            logger.error(
                "no step for %.0f s, where one may take %.0f s: the group hangs; every rank's stack:",
                seconds,
                self.limit,
            )
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            for pid in self._peers.values():
                _signal_main_thread(pid, signal.SIGUSR2)
                _signal(pid, signal.SIGCONT)
            time.sleep(_DUMP_SECONDS)
            for pid in self._peers.values():
                _signal(pid, signal.SIGKILL)
        finally:
            os._exit(1)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _signal_main_thread(pid: int, number: signal.Signals) -> None:
    """Send a signal that the process's main thread handles before it runs any other code.

    Any thread may handle a signal to the process, and would dump the stack of a main thread that runs meanwhile: the
    frames change while they are read, and some are missed.
    """
    try:
        ctypes.CDLL(None).tgkill(pid, pid, number)
    except AttributeError:  # glibc before 2.30
        _signal(pid, number)


def _processes_of_this_host(group: ExpertGroup) -> dict[int, int]:
    """Return the process ids of the other ranks on this host, by rank."""
    own = (_process_table(), os.getpid())
    processes: list[tuple[str, int] | None] = [None] * group.size
    dist.all_gather_object(processes, own)
    return {rank: there[1] for rank, there in enumerate(processes) if there and there[0] == own[0] and there != own}


def _is_suspended(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")


def _process_table() -> str:
    """Return an identifier of this kernel's boot and PID namespace, within which a process id is unique.

    Hosts and containers may share a hostname, and a watchdog could then kill an unrelated process.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
