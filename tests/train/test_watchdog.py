"""Which processes a watchdog counts as peers of its rank, and what it counts as a hang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.processes import wait_for

from btm_scale.config.training import HealthConfig
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


def test_a_long_save_is_not_a_hang_while_it_advances_or_waits_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "_processes_of_this_host", lambda group: {})
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watchdog.HangWatch, "_end", lambda self, seconds: ended.set())
    group: Any = SimpleNamespace()
    config = HealthConfig(patience=0.1)  # the first steps may take ten times that
    with watchdog.HangWatch(group, config) as watch, watch.between_steps():
        for _ in range(30):
            time.sleep(0.05)
            watch.progress()
        with watch.waiting():
            time.sleep(1.2)
        assert not ended.is_set()
        assert ended.wait(30), "without progress it is a hang"


def test_a_wait_for_a_suspended_rank_is_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    peer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(watchdog, "_processes_of_this_host", lambda group: {1: peer.pid})
    monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(watchdog.HangWatch, "_end", lambda self, seconds: ended.set())
    group: Any = SimpleNamespace()
    try:
        with watchdog.HangWatch(group, HealthConfig(patience=0.1)) as watch, watch.between_steps(), watch.waiting():
            assert not ended.wait(1.5), "the rank runs, and has a watchdog itself"
            peer.send_signal(signal.SIGSTOP)
            assert ended.wait(30)
    finally:
        peer.kill()
        peer.communicate()


MANY_THREADS = """
import contextlib, faulthandler, signal, sys, threading, time
faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)
for _ in range(8):
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
@contextlib.contextmanager
def short():
    yield
def train():
    print("trains", flush=True)
    while True:
        with short():
            pass
train()
"""


def test_the_stack_of_a_rank_that_is_resumed_is_dumped_whole(tmp_path: Path) -> None:
    """Also where the main thread runs again at once, and another thread could handle the signal."""
    stacks = tmp_path / "stacks"
    with stacks.open("w") as file:
        rank = subprocess.Popen([sys.executable, "-c", MANY_THREADS], stdout=subprocess.PIPE, stderr=file)
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == b"trains\n"
        for times in range(1, 21):
            rank.send_signal(signal.SIGSTOP)
            wait_for(lambda: watchdog._is_suspended(rank.pid), 30)
            watchdog._signal_main_thread(rank.pid, signal.SIGUSR2)
            rank.send_signal(signal.SIGCONT)
            wait_for(lambda times=times: stacks.read_text().count("in <module>") == times, 30)
            assert stacks.read_text().count("in train") == times
    finally:
        rank.kill()
        rank.communicate()


SLOW_STEP = """
import time
from btm_scale.config.training import HealthConfig
from btm_scale.train import watchdog
watchdog._processes_of_this_host = lambda group: {}
with watchdog.HangWatch(None, HealthConfig(patience=0.01)) as watch:
    with watch.WORK():
        time.sleep(1.0)
print("went on")
"""


@pytest.mark.parametrize("work", ["step", "between_steps"])
def test_a_group_that_is_said_to_hang_ends_though_it_could_go_on(work: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW_STEP.replace("WORK", work)], capture_output=True, text=True, timeout=300
    )
    assert "most recent call first" in done.stderr
    assert (done.returncode, done.stdout) == (1, "")
