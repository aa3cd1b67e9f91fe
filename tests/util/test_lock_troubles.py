"""Lock problems: file systems without locks, locks of dead processes, and locks held on another host."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from btm_scale.errors import GroupFailed, UserError
from btm_scale.util import locks
from btm_scale.util.locks import ModelLock, alone, alone_at_once, held, holder_of, shared

LOCKS: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "held": held,
    "alone": alone,
    "shared": shared,
    "alone_at_once": alone_at_once,
    "model": lambda path: ModelLock(path.parent),
}


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_named_with_a_remedy(
    kind: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fails)
    with pytest.raises(UserError, match=rf"Cannot lock {tmp_path}/lock\S*: its file system has no file locks"):
        LOCKS[kind](tmp_path / "lock").__enter__()


def test_another_users_lock_on_a_file_system_that_locks_only_writable_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_nfs(file: object, operation: int) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    with pytest.raises(UserError, match=r"it belongs to another user, .* chmod a\+w"), alone(tmp_path / "lock"):
        pass


def holder(lock: Path) -> subprocess.Popen[str]:
    """Start a process that holds a lock until it is killed."""
    script = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, 2); print('held', flush=True); "
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", LOCKS)
def test_the_lock_of_a_killed_process_is_free(kind: str, tmp_path: Path) -> None:
    process = holder(tmp_path / "lock")
    with alone_at_once(tmp_path / "lock") as is_ours:
        assert not is_ours
    process.kill()
    process.wait()
    with LOCKS[kind](tmp_path / "lock") as is_ours:
        assert is_ours is not False


def test_a_message_names_the_process_that_holds_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = holder(tmp_path / "lock")
    try:
        assert holder_of(tmp_path / "lock").startswith(f"process {process.pid} (python")
        monkeypatch.setattr(locks, "_LOCK_SECONDS", 0.0)
        with pytest.raises(GroupFailed, match=rf"another group is training .* \(process {process.pid} \("):
            ModelLock(tmp_path).__enter__()
    finally:
        process.kill()
        process.wait()


def test_a_lock_that_no_process_of_this_host_holds_is_held_on_another_host(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert holder_of(tmp_path / "lock") == "a process on another host"


def test_a_process_that_waits_to_hold_a_lock_alone_comes_before_later_sharers(tmp_path: Path) -> None:
    lock, order = tmp_path / "lock", list[str]()

    def ask(kind: Callable[[Path], AbstractContextManager[object]], name: str) -> threading.Thread:
        def wait() -> None:
            with kind(lock):
                order.append(name)

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    with shared(lock):
        ask(shared, "beside").join(5)
        assert order == ["beside"]
        waiting = ask(alone, "alone")
        waiting.join(0.2)
        late = ask(shared, "late")
        late.join(0.2)
        assert order == ["beside"]
    waiting.join(5)
    late.join(5)
    assert order == ["beside", "alone", "late"]
