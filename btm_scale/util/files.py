"""Files and directories are written under a name that nobody looks for, and named when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from btm_scale.errors import CheckpointError


def partial_path(final: Path) -> Path:
    """Where `final` is written before it is published: `.<name>.partial` beside it."""
    return final.with_name(f".{final.name}.partial")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory outlive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file so that it is whole or absent: aside, synced, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def publish_directory(temporary: Path, final: Path, *, replace: bool = False) -> None:
    """Give a finished directory its name; with `replace`, what had the name goes only after that.

    Raises `CheckpointError` if `final` exists, holds anything, and `replace` is false.
    """
    outgoing = final.with_name(f".{final.name}.replaced.{os.getpid()}")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        if not replace:
            raise CheckpointError(f"{final} exists already. Choose another output, or remove it first.")
        final.rename(outgoing)
    sync_directory(temporary)
    try:
        temporary.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise CheckpointError(f"{final} was made by another process at the same time. Choose another output.") from None
    sync_directory(final.parent)
    if outgoing.is_dir():
        shutil.rmtree(outgoing)
    else:
        outgoing.unlink(missing_ok=True)


def existing_parent(path: Path) -> Path:
    """The nearest directory at or above `path` that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def allocated(directory: Path) -> int:
    """Bytes that a directory's files take on the disk: of a file that is laid out but not written, nearly none."""
    return sum(file.stat().st_blocks * 512 for file in directory.glob("*"))


def require_space(path: Path, needed: int) -> None:
    """Raise `CheckpointError` unless the file system of `path` has `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(path)).free
    if needed > free:
        raise CheckpointError(
            f"{path} needs {needed / 1e9:.3f} GB and its file system has {free / 1e9:.3f} GB free. "
            "Nothing was written. Free some space or choose another place."
        )
