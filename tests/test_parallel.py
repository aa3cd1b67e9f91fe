from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from btm_scale import parallel
from btm_scale.errors import LaunchError
from btm_scale.parallel import in_processes, in_threads


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "CORES", 2)


def slower_first(item: int) -> tuple[int, int]:
    time.sleep(0.05 / (1 + item))
    return item, os.getpid()


def killed_at_three(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def threads_of_a_worker(item: int) -> int:
    return len(set(in_threads(lambda _: threading.get_ident(), range(8))))


def refuse(item: int) -> int:
    raise LaunchError(f"no room for {item}")


def test_what_is_done_comes_in_the_order_of_the_items() -> None:
    found = in_processes(slower_first, range(8))
    assert [item for item, _ in found] == list(range(8))
    assert os.getpid() not in {process for _, process in found}
    assert [item for item, _ in in_threads(slower_first, range(8), at_once=3)] == list(range(8))


def test_where_another_thread_runs_nothing_is_forked() -> None:
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        assert {process for _, process in in_processes(slower_first, range(4))} == {os.getpid()}
    finally:
        end.set()
        other.join()


def test_a_worker_has_no_threads_beside_the_other_workers() -> None:
    assert in_processes(threads_of_a_worker, range(4)) == [1] * 4


def test_an_error_reaches_the_caller_as_it_is() -> None:
    with pytest.raises(LaunchError, match="no room for 0"):
        in_processes(refuse, range(4))
    with pytest.raises(LaunchError, match="no room for 0"):
        in_threads(refuse, range(4))


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(LaunchError, match="a worker process of this command was killed"):
        in_processes(killed_at_three, range(6))
