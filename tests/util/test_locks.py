"""Locks between processes."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from btm_scale.errors import GroupFailed, UserError
from btm_scale.util.locks import ModelLock, alone, alone_at_once, shared


def test_checking_the_lock_does_not_keep_a_group_from_starting(tmp_path: Path) -> None:
    """`status --watch` takes it for a moment every two seconds, on a slow file system for a long one."""
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as asks:
        fcntl.flock(asks, fcntl.LOCK_SH)
        threading.Timer(0.3, asks.close).start()
        with ModelLock(tmp_path):
            assert ModelLock.is_held(tmp_path)
    assert not ModelLock.is_held(tmp_path)


def test_a_second_group_is_refused(tmp_path: Path) -> None:
    with (
        ModelLock(tmp_path),
        pytest.raises(GroupFailed, match="another group is training"),
        ModelLock(tmp_path),
    ):
        pass


def test_a_lock_is_visible_with_read_permission_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ModelLock.is_held(tmp_path)
    with ModelLock(tmp_path):
        opened = Path.open

        def only_read(self: Path, mode: str = "r", *arguments: Any, **settings: Any) -> Any:
            if mode != "r":
                raise PermissionError(f"{self} may only be read")
            return opened(self, mode, *arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", only_read)
            assert ModelLock.is_held(tmp_path)
    assert not ModelLock.is_held(tmp_path)


def test_a_second_holder_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with alone(tmp_path / "slurm" / "lock"):
            order.append("second")

    with alone(tmp_path / "slurm" / "lock"):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]


def refused_in(turn: AbstractContextManager[object]) -> None:
    with pytest.raises(UserError, match="refused"), turn:
        raise UserError("refused")


@pytest.mark.parametrize("kind", [alone, shared, alone_at_once])
def test_a_refused_command_leaves_no_lock_that_it_made(
    kind: Callable[[Path], AbstractContextManager[object]], tmp_path: Path
) -> None:
    refused_in(kind(tmp_path / ".locks" / "config"))
    assert not list(tmp_path.iterdir())
    with alone(tmp_path / ".locks" / "config"):
        pass
    before = sorted(tmp_path.rglob("*"))
    refused_in(kind(tmp_path / ".locks" / "config"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_command_does_not_remove_a_lock_that_another_process_shares(tmp_path: Path) -> None:
    lock = tmp_path / ".locks" / "forest"
    with ExitStack() as other:

        def refused() -> None:
            with shared(lock):
                other.enter_context(shared(lock))
                raise UserError("refused")

        with pytest.raises(UserError, match="refused"):
            refused()
        with alone_at_once(lock) as is_ours:
            assert not is_ours


def test_who_waited_for_a_refused_command_is_alone(tmp_path: Path) -> None:
    """The file that it waited for is gone: it must not take turns with those that lock the next file of that name."""
    lock, together, most = tmp_path / ".locks" / "config", [], []

    def work(number: int) -> None:
        for turn in range(20):
            with suppress(UserError), alone(lock):
                together.append(number)
                most.append(len(together))
                time.sleep(0.0005)
                together.remove(number)
                if turn % 2:
                    raise UserError("refused")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 120
    assert max(most) == 1
