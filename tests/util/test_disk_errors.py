"""Errors of a full or broken disk name a file, whichever library they come from, and leave what was there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from btm_scale.util import files
from btm_scale.util.disk_errors import sentence, writing
from btm_scale.util.files import new_directory, publish_directory, write_file
from btm_scale.util.locks import alone

FULL = Path("/dev/full")


@pytest.mark.parametrize(
    "write",
    [lambda: FULL.write_text("text"), lambda: Tokenizer(BPE()).save(str(FULL)), lambda: FULL.write_bytes(b"\0" * 9000)],
    ids=["text", "a tokenizer", "bytes"],
)
def test_a_full_disk_is_an_error_that_names_the_file(write: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as raised, writing(tmp_path / "file"):
        write()
    assert raised.value.errno == errno.ENOSPC
    message = sentence(raised.value)
    assert message is not None
    assert str(tmp_path / "file") in message


def test_errors_of_safetensors_are_errors_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)), writing(tmp_path):
        save_file({"a": np.zeros(1)}, tmp_path / "missing" / "file")


def test_torch_reports_why_it_cannot_save(tmp_path: Path) -> None:
    def save() -> None:
        with FULL.open("wb", buffering=0) as file:
            torch.save({"a": torch.zeros(3)}, file)

    with pytest.raises(OSError, match="No space left on device"), writing(tmp_path / "file"):
        save()


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        1 / 0
    assert sentence(FileNotFoundError(errno.ENOENT, "No such file or directory")) is None


def test_a_directory_that_cannot_be_replaced_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("final", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(source).name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        publish_directory(tmp_path / "new", tmp_path / "final", replace=True)
    assert (tmp_path / "final" / "file").read_text() == "final"


def test_a_full_disk_leaves_nothing_of_a_new_directory(tmp_path: Path) -> None:
    def write(final: Path) -> None:
        with new_directory(final) as directory:
            (directory / "file").write_text("text")
            FULL.write_text("text")

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'final'}'"):
        write(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "works"), [(errno.EPERM, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_file_system_without_permissions_can_hold_a_run(
    number: int, works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an SMB share, or of an object store behind FUSE, are those of the mount."""

    def chmod(path: object, mode: int, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "chmod", chmod)
    with contextlib.nullcontext() if works else pytest.raises(OSError, match="Input/output error"):
        with new_directory(tmp_path / "folder") as folder:
            (folder / "file").write_text("text")
        assert (tmp_path / "folder" / "file").read_text() == "text"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_sync_is_written_with_one_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(files, "_unsynced", set())
    for name in ("a", "b"):
        write_file(tmp_path / name, name)
    with new_directory(tmp_path / "c") as directory:
        (directory / "file").write_text("text")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}
    assert caplog.text.count("cannot sync") == 1


@pytest.mark.parametrize("call", ["fsync", "flock"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.ENOTCONN])
def test_a_broken_disk_or_server_is_a_sentence_with_the_path(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (fcntl, "flock")), fails)
    use = alone(tmp_path / "file").__enter__ if call == "flock" else lambda: write_file(tmp_path / "file", "text")
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        use()
    message = sentence(raised.value)
    assert message is not None
    assert message.startswith(f"Cannot use {tmp_path / 'file'}")
    assert "\n" not in message


@pytest.mark.parametrize(
    "path", ["file/run", "loop/run", "n" * 300], ids=["below a file", "below a loop of links", "a long name"]
)
def test_a_path_that_cannot_be_is_a_sentence_with_a_remedy(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=path[:4]) as raised:
        (tmp_path / path).mkdir()
    assert str(sentence(raised.value)).endswith("or choose another path, and rerun to resume.")


def test_the_same_error_of_a_socket_is_not_one_of_a_disk() -> None:
    assert sentence(OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))) is None
