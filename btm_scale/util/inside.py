"""Files that a model directory names: they are in that directory, wherever an index, a marker or a link points."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from btm_scale.errors import CheckpointError
from btm_scale.util.files import set_mode

_HUB_SNAPSHOTS = "snapshots"
_HUB_BLOBS = "blobs"


def file_inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in a model directory; the file need not exist.

    Raises `CheckpointError` for an absolute path, a path with `..`, and a link that leads out of the directory. Links
    of the Hugging Face cache, from a snapshot to the blobs of the same repository, are allowed.
    """
    if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise CheckpointError(
            f"{folder} refers to the file {name!r}. A model directory may refer only to its own files. Copy them here."
        )
    path = folder / name
    try:
        path.exists()  # raises OSError for a name that is too long
        actual, own = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CheckpointError(
            f"{folder / name[:100]} cannot be resolved: {str(error)[:200]}. Copy the file here."
        ) from None
    if actual.is_relative_to(own) or any(actual.is_relative_to(blobs) for blobs in _hub_blobs(folder)):
        return path
    raise CheckpointError(
        f"{path} is a link to {actual}, outside of the model directory. Links may lead only to files of the directory. "
        "Copy the file here."
    )


def copy_inside(folder: Path, name: str, target: Path) -> None:
    """Copy a file of a model directory into the directory `target`, where at most the same users may read it.

    Raises `CheckpointError` as `file_inside` does.
    """
    source, copy = file_inside(folder, name), target / name
    shutil.copyfile(source, copy)
    set_mode(copy, copy.stat().st_mode & (source.stat().st_mode | 0o600) & 0o777)


def as_private_as(sources: Iterable[Path], copy: Path) -> None:
    """Let at most those users read `copy` who may read every file of its sources; all are files or folders of files."""
    mode = 0o777
    for source in sources:
        for file in _files(source):
            mode &= file.stat().st_mode
    for file in _files(copy):
        set_mode(file, file.stat().st_mode & (mode | 0o600) & 0o777)


def _files(path: Path) -> Iterable[Path]:
    return (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _hub_blobs(folder: Path) -> list[Path]:
    """Return where the Hugging Face cache keeps the content of a snapshot's files."""
    own = folder.resolve()
    return [parent.parent / _HUB_BLOBS for parent in (own, *own.parents) if parent.name == _HUB_SNAPSHOTS]
