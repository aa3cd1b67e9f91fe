"""Pools, each tested in a separate process: the test runner's has threads, and a process with threads is not forked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest
from helpers.processes import is_alive, wait_for

BEFORE = """
import os, signal, threading, time
from btm_scale.errors import WorkerLost
from btm_scale.util import pools
from btm_scale.util.pools import in_processes, in_threads, lost_workers_told, process_pool
pools.CORES = 2

def slower_first(item):
    time.sleep(0.05 / (1 + item))
    return item, os.getpid()

def killed_at_three(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item

def threads_of_a_worker(item):
    return len(set(in_threads(lambda _: threading.get_ident(), range(8))))

def refuse(item):
    raise WorkerLost(f"no room for {item}")

def told(call, do, items):
    try:
        call(do, items)
    except WorkerLost as error:
        return str(error)
    raise AssertionError("no error")
"""


def run(code: str) -> None:
    script = BEFORE + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_results_are_in_the_order_of_the_items() -> None:
    run("""
        found = in_processes(slower_first, range(8))
        assert [item for item, _ in found] == list(range(8))
        assert os.getpid() not in {process for _, process in found}
        assert [item for item, _ in in_threads(slower_first, range(8), at_once=3)] == list(range(8))
    """)


def test_no_process_is_forked_while_another_thread_runs() -> None:
    run("""
        end = threading.Event()
        threading.Thread(target=end.wait).start()
        found = in_processes(slower_first, range(4))
        end.set()
        assert {process for _, process in found} == {os.getpid()}
    """)


def test_a_worker_has_no_threads_beside_the_other_workers() -> None:
    run("""
        assert in_processes(threads_of_a_worker, range(4)) == [1] * 4
    """)


def test_an_error_reaches_the_caller_as_it_is() -> None:
    run("""
        assert told(in_processes, refuse, range(4)) == "no room for 0"
        assert told(in_threads, refuse, range(4)) == "no room for 0"
    """)


def test_a_killed_worker_is_reported() -> None:
    run("""
        assert "a worker process of this command was killed" in told(in_processes, killed_at_three, range(6))
    """)


def test_a_spawned_worker_starts_with_its_initializer_and_reports_that_it_was_killed() -> None:
    run("""
        with process_pool(1, forks=False, initializer=os.chdir, initargs=("/",)) as pool:
            assert pool.submit(os.getcwd).result() == "/" != os.getcwd()
            try:
                with lost_workers_told():
                    pool.submit(os._exit, 1).result()
            except WorkerLost as error:
                assert "a worker process of this command was killed" in str(error)
            else:
                raise AssertionError("no error")
    """)


@pytest.mark.parametrize("forks", [True, False], ids=["forked", "spawned"])
def test_workers_end_with_the_process_that_was_killed(forks: bool) -> None:
    script = f"""
        pool = process_pool(1, forks={forks})
        print(pool.submit(os.getpid).result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    words = [sys.executable, "-c", BEFORE + textwrap.dedent(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    worker = int(done.stdout)
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(worker)
        wait_for(lambda: not is_alive(process), 30)


def after_ctrl_c(handler: str, seconds: float) -> tuple[str, str]:
    """Return what a process with a pool prints that gets SIGINT, as does each of its workers, which take `seconds`."""
    code = f"""
        def wait(item):
            os.write(1, b"begun\\n")
            time.sleep({seconds})

        signal.signal(signal.SIGINT, signal.{handler})
        try:
            in_processes(wait, range(2))
            print("done", flush=True)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    command = [sys.executable, "-c", BEFORE + textwrap.dedent(code)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    return process.communicate(timeout=30)


def test_ctrl_c_at_a_terminal_ends_workers_without_their_tracebacks() -> None:
    assert after_ctrl_c("default_int_handler", 60) == ("interrupted\n", "")


def test_workers_of_a_command_that_ignores_ctrl_c_ignore_it_too() -> None:
    """A shell script starts its background commands so."""
    assert after_ctrl_c("SIG_IGN", 0.5) == ("done\n", "")


def test_a_request_to_stop_reaches_no_worker_while_it_starts_or_works() -> None:
    """SLURM sends it to every process of a step; this one decides what stops."""
    run("""
        os.setsid()
        signal.signal(signal.SIGUSR1, lambda *_: None)
        for forks in (True, False):
            with process_pool(2, forks=forks) as pool:
                waiting = [pool.submit(time.sleep, 0.05) for _ in range(4)]
                os.killpg(0, signal.SIGUSR1)
                waiting[0].result()
                os.killpg(0, signal.SIGUSR1)
                assert [one.result() for one in waiting] == [None] * 4
    """)


def test_a_user_who_may_start_no_more_processes_is_told_of_the_limit() -> None:
    run("""
        import resource
        for forks in (True, False):  # imports what the user below may not read
            with process_pool(1, forks=forks) as pool:
                pool.submit(time.sleep, 0).result()
        if os.getuid() == 0:
            os.setuid(65534)  # root has no limit
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        for forks in (True, False):
            try:
                with process_pool(2, forks=forks) as pool:
                    pool.submit(time.sleep, 0).result()
                raise AssertionError("no error")
            except WorkerLost as error:
                assert "Cannot start a worker process: Resource temporarily unavailable" in str(error)
                assert "ulimit -u" in str(error)
    """)
