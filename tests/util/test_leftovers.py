"""What a killed process left under a temporary name is removed; what a living one writes stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from btm_scale.util import leftovers
from btm_scale.util.files import new_directory, new_file, write_file
from btm_scale.util.leftovers import scratch_directory


def write_a_file(folder: Path, then: Callable[[], None]) -> None:
    with new_file(folder / "scores") as file:
        file.write(b"half of it")
        file.flush()
        then()


def add_a_folder(folder: Path, then: Callable[[], None]) -> None:
    with new_directory(folder / "expert", shared=True) as directory:
        (directory / "weights").write_bytes(b"half of it")
        then()


def measure(folder: Path, then: Callable[[], None]) -> None:
    with scratch_directory(folder / "ablation") as directory:
        (directory / "average").mkdir()
        then()


WRITERS = [write_a_file, add_a_folder, measure]


def killed_in(write: Callable[[Path, Callable[[], None]], None], folder: Path) -> list[str]:
    """Let another process be killed while it writes; returns the names that it left."""
    pid = os.fork()
    if pid == 0:
        write(folder, lambda: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(pid, 0)
    return names(folder)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("write", WRITERS)
def test_the_next_write_in_a_folder_removes_what_a_killed_process_left(
    write: Callable[[Path, Callable[[], None]], None], tmp_path: Path
) -> None:
    [left] = killed_in(write, tmp_path)
    assert left.endswith(".partial")
    write_file(tmp_path / "results", "of another kind")
    assert names(tmp_path) == ["results"]


@pytest.mark.parametrize("next_write", WRITERS)
def test_every_kind_of_write_removes_it(next_write: Callable[[Path, Callable[[], None]], None], tmp_path: Path) -> None:
    [left] = killed_in(add_a_folder, tmp_path)
    next_write(tmp_path, lambda: None)
    assert left not in names(tmp_path)


@pytest.mark.parametrize("write", WRITERS)
def test_what_another_process_still_writes_stays(
    write: Callable[[Path, Callable[[], None]], None], tmp_path: Path
) -> None:
    pid = os.fork()
    if pid == 0:
        write(tmp_path, lambda: time.sleep(60))
    try:
        while not any(name.endswith(".partial") for name in names(tmp_path)):
            time.sleep(0.01)
        [written] = names(tmp_path)
        time.sleep(0.05)  # between its creation and its lock
        write_file(tmp_path / "results", "of this process")
        assert names(tmp_path) == [written, "results"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_another_user_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [left] = killed_in(write_a_file, tmp_path)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    write_file(tmp_path / "results", "of another user")
    assert names(tmp_path) == [left, "results"]


def test_a_link_with_such_a_name_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".scores.01234567.partial").symlink_to(tmp_path / "precious")
    write_file(tmp_path / "results", "beside a link")
    assert (tmp_path / "precious" / "file").exists()


def test_other_hidden_names_stay(tmp_path: Path) -> None:
    kept = [".model.partial", ".model.partial.lock", ".notes", ".scores.0123.partial", ".ablation-notes-of-mine"]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".ablation-x1y2z3_w").mkdir()  # as earlier versions named it
    write_file(tmp_path / "results", "beside them")
    assert names(tmp_path) == sorted([*kept, "results"])


def test_a_partial_that_is_taken_for_a_leftover_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may look between its creation and its lock."""
    lock, first = leftovers._is_locked, []

    def late(descriptor: int, path: Path) -> bool:
        if not first:
            first.append(path.name)
            path.unlink()
        return lock(descriptor, path)

    monkeypatch.setattr(leftovers, "_is_locked", late)
    write_file(tmp_path / "results", "whole")
    assert names(tmp_path) == ["results"]
    assert len(first) == 1


def test_a_directory_that_is_removed_before_it_is_locked_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take it for a leftover."""
    first: list[str] = []
    plain = os.open

    def late(path: Path, *arguments: int, **named: Any) -> int:
        if not first:
            first.append(path.name)
            path.rmdir()
        return plain(path, *arguments, **named)

    with monkeypatch.context() as changed:
        changed.setattr(leftovers.os, "open", late)
        with scratch_directory(tmp_path / "adapter") as folder:
            assert folder.is_dir()
            assert folder.name not in first
    assert len(first) == 1
    assert names(tmp_path) == []
