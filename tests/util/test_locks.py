"""Locks between processes."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest

from btm_scale.errors import GroupFailed
from btm_scale.util.locks import ModelLock, alone


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
