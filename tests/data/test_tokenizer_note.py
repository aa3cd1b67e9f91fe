"""A run notes that its tokenizer passed the trial; no one else can say so."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_tokenizers import HOSTILE, write

from btm_scale.data import tokenizer_note, tokenizer_trial
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tokenizers that were tried; nothing of an earlier process is remembered, and the trial is a fork."""
    tried: list[Path] = []
    try_it = tokenizer_trial._try
    monkeypatch.setattr(tokenizer_trial, "_passed", set())
    monkeypatch.setattr(tokenizer_trial, "may_fork", lambda: True)
    monkeypatch.setattr(tokenizer_trial, "_try", lambda where, *rest: (tried.append(where), try_it(where, *rest))[1])
    return tried


@pytest.fixture
def run(tmp_path: Path, trials: list[Path]) -> RunDir:
    """A run whose tokenizer has passed."""
    run = RunDir(tmp_path / "run")
    write(run.tokenizer)
    run.config.write_text("name: run\n")
    as_new_process(run)
    trials.clear()
    return run


def as_new_process(run: RunDir) -> Tokenizer:
    """Load the run's tokenizer without what this process remembers."""
    tokenizer_trial._passed.clear()
    return Tokenizer.load(run.tokenizer)


def note_of(run: RunDir) -> Path:
    [note] = run.root.glob(".tokenizer-passed-*")
    return note


def test_another_process_does_not_try_the_tokenizer_of_a_run_again(run: RunDir, trials: list[Path]) -> None:
    assert as_new_process(run).decode(as_new_process(run).encode("a text")) == "a text"
    assert trials == []


def test_a_note_is_for_its_owner_alone(run: RunDir) -> None:
    assert note_of(run).stat().st_mode & 0o777 == 0o600


def writable_by_others(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note.chmod(0o620)


def a_link(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note.rename(note.parent / "elsewhere")
    note.symlink_to(note.parent / "elsewhere")


def a_hard_link(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.link(note, note.parent / "elsewhere")


def of_another_user(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    note.rename(note.with_name(f".tokenizer-passed-{other}"))


def of_another_library(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_note, "version", lambda name: "99.0")


def for_files_that_were_replaced(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = note.parent / "tokenizer" / "tokenizer.json"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [writable_by_others, a_link, a_hard_link, of_another_user, of_another_library, for_files_that_were_replaced],
)
def test_a_note_that_another_could_have_written_does_not_count(
    change: Callable[[Path, pytest.MonkeyPatch], None],
    run: RunDir,
    trials: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(note_of(run), monkeypatch)
    as_new_process(run)
    assert trials == [run.tokenizer]


def test_a_note_that_comes_with_a_copied_run_does_not_count(run: RunDir, trials: list[Path], tmp_path: Path) -> None:
    """As a stranger's archive would bring it: the files belong to the user who unpacked it."""
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(run.root, copy.root)
    as_new_process(copy)
    as_new_process(copy)
    assert trials == [copy.tokenizer]


def test_a_tokenizer_that_is_replaced_by_a_hostile_one_is_refused(run: RunDir) -> None:
    write(run.tokenizer, HOSTILE["panics when it encodes"][0])
    for _ in range(2):  # a failed trial leaves no note
        with pytest.raises(DataError, match="non-zero"):
            as_new_process(run)


def test_no_variable_of_the_environment_replaces_the_trial(
    tmp_path: Path, trials: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "own")
    Tokenizer.load(directory)
    [key] = tokenizer_trial.trials_passed()
    monkeypatch.setenv("BTM_SCALE_TRIED_TOKENIZERS", key)
    tokenizer_trial._passed.clear()
    Tokenizer.load(directory)
    assert len(trials) == 2


def test_nothing_is_written_beside_a_tokenizer_that_is_not_a_runs(tmp_path: Path, trials: list[Path]) -> None:
    Tokenizer.load(write(tmp_path / "model" / "tokenizer"))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["tokenizer"]


@pytest.mark.parametrize(("error", "ends"), [(errno.EROFS, False), (errno.EACCES, False), (errno.ENOSPC, True)])
def test_a_run_that_cannot_be_written_to_can_be_read_and_a_full_disk_is_reported(
    error: int, ends: bool, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> Any:
        raise OSError(error, os.strerror(error), str(path))

    note_of(run).unlink()
    monkeypatch.setattr(tokenizer_note, "new_file", fail)
    if not ends:
        assert as_new_process(run).encode("text")
        return
    with pytest.raises(OSError, match=os.strerror(error)):
        as_new_process(run)
