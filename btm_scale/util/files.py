"""Atomic publish of files and directories: write to a temporary name, fsync, rename, fsync the folder.

What has its final name is complete, even after a power cut. Files in a directory without its final name need no sync:
`publish_directory` syncs them all once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from btm_scale.errors import CheckpointError
from btm_scale.util.disk_errors import writing
from btm_scale.util.leftovers import new_partial_directory, new_partial_file
from btm_scale.util.no_follow import open_no_follow
from btm_scale.util.pools import in_threads

logger = logging.getLogger(__name__)

# A sync waits for the disk, which handles several at once.
_SYNCS_AT_ONCE = 16
# What fsync answers on file systems without it, such as some of FUSE and SMB.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# What chmod answers on file systems whose permissions are those of the mount.
_NO_MODES = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_unsynced: set[int] = set()  # devices for which this has been logged

os.umask(_UMASK := os.umask(0o077))  # the process's own, which can only be read by setting it


def partial_path(final: Path) -> Path:
    """Return the temporary path of `final`: `.<name>.partial` beside it."""
    return final.with_name(f".{final.name}.partial")


def sync_directory(directory: Path) -> None:
    """Sync a directory, so that the names in it survive a power cut."""
    _sync(directory)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents if needed, so that their names survive a power cut."""
    new = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for place in reversed(new):
        _sync(place.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a small file atomically; text is written as UTF-8."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def make_partial(partial: Path) -> None:
    """Make the directory in which an output is written, readable by this user alone until it is published.

    What an interrupted process left there is removed first. Raises `CheckpointError` if another user's stays.
    """
    remove_partial(partial)
    make_directory(partial.parent)
    try:
        partial.mkdir(mode=0o700)
    except FileExistsError:
        raise CheckpointError(
            f"Cannot write {partial}: it exists and cannot be removed. "
            "A partial output of another user is never used. Remove it, or choose another output."
        ) from None


def remove_partial(partial: Path) -> None:
    """Remove an unpublished directory, a link of that name or, if it belongs to another user, its name."""
    if partial.is_symlink() or not partial.is_dir():
        partial.unlink(missing_ok=True)
        return
    shutil.rmtree(partial, ignore_errors=True)
    if partial.exists():
        with contextlib.suppress(OSError):  # a folder that a group shares lets its name be taken, not its content
            partial.rename(partial.with_name(f"{partial.name}.{secrets.token_hex(4)}.foreign"))


def is_private(path: Path) -> bool:
    """Whether a directory is no link, belongs to this user, and no other user can write to it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def content_if_own(path: Path, most: int) -> bytes | None:
    """Return the content of a file of at most `most` bytes that this user owns and no other user can write to.

    None for any other, and for a link, also a hard one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1
        if not is_own or status.st_mode & 0o022 or status.st_size > most:
            return None
        return file.read(most)


def open_to_append(path: Path) -> IO[bytes]:
    """Open a file of a run for appending, without following a link: another user may have planted one.

    Raises `CheckpointError` for a link, or for anything else that is not a file.
    """
    refusal = CheckpointError(
        f"Cannot write {path}: it is a link or not a file. Another user may have put it there: remove it."
    )
    return os.fdopen(open_no_follow(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, refusal), "ab")


def refuse_foreign_links(folder: Path, *, depth: int = 4) -> None:
    """Raise `CheckpointError` for a link of another user in a folder that a group shares, down to `depth` levels.

    The user's own links, and root's, are followed: they lead where this user wants to write.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # absent, or not readable
        return
    for entry in entries:
        if entry.is_symlink():
            _require_own(Path(entry.path))
        elif depth > 1 and entry.is_dir(follow_symlinks=False):
            refuse_foreign_links(Path(entry.path), depth=depth - 1)


def _require_own(link: Path) -> None:
    owner, user = link.lstat().st_uid, os.geteuid()
    if owner in (user, 0) or (user == 0 and owner == link.parent.stat().st_uid):  # root works in a user's folder
        return
    raise CheckpointError(
        f"{link} is a link to {link.readlink()} that another user made (uid {owner}). Links of other users are not "
        "followed in a run: remove it, or create it yourself."
    )


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when the block ends, and is removed if the block raises.

    Its folder must exist. Several processes may write one path; the last to finish wins.
    """
    with writing(path):
        temporary, file = new_partial_file(path)
        try:
            with file:
                yield file
                file.flush()
                _sync_descriptor(file.fileno(), path)
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _sync(path.parent)


@contextmanager
def new_directory(final: Path, *, shared: bool = False) -> Iterator[Path]:
    """Make a directory that is published as `final` when the block ends, and is removed if the block raises.

    Several processes may make a `shared` one at once, and the first succeeds. Otherwise the leftover of an interrupted
    process at `partial_path(final)` is removed first. Raises `CheckpointError` if `final` exists with content.
    """
    with ExitStack() as stack:
        if shared:
            make_directory(final.parent)
            temporary = stack.enter_context(new_partial_directory(final))
        else:
            temporary = partial_path(final)
            make_partial(temporary)
        try:
            with writing(final):
                yield temporary
                publish_directory(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file of this process, unless its file system has none (SMB, FUSE of object stores)."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in _NO_MODES:
            raise


def publish_directory(temporary: Path, final: Path, *, replace: bool = False, synced: bool = False) -> None:
    """Sync a finished directory and rename it; with `replace`, the old one is removed after that.

    `synced`: the content has been synced already, under its temporary name. An error leaves the old one. Raises
    `CheckpointError` if `final` exists, has content, and `replace` is false.
    """
    outgoing = final.with_name(f".{final.name}.{secrets.token_hex(4)}.replaced")
    exists = final.exists() and (not final.is_dir() or any(final.iterdir()))
    if exists and not replace:
        raise CheckpointError(f"{final} exists already. Choose another output, or remove it first.")
    # Until now this user's alone. What mkdir would have given it, with the group that it inherits from its parent.
    set_mode(temporary, 0o777 & ~_UMASK | temporary.stat().st_mode & stat.S_ISGID)
    if not synced:
        in_threads(_sync, _everything_in(temporary), at_once=_SYNCS_AT_ONCE)
    if exists:
        final.rename(outgoing)
    try:
        temporary.rename(final)
    except OSError as error:
        if exists:
            with contextlib.suppress(OSError):
                outgoing.rename(final)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise CheckpointError(
            f"{final} was created by another process at the same time. Choose another output."
        ) from None
    _sync(final.parent)
    if outgoing.is_dir():
        shutil.rmtree(outgoing)
    else:
        outgoing.unlink(missing_ok=True)


def _everything_in(directory: Path) -> list[Path]:
    """Return the files of a directory, then its folders from the innermost to itself."""
    files: list[Path] = []
    folders: list[Path] = []
    for folder, _, names in os.walk(directory, topdown=False):
        folders.append(Path(folder))
        files += [path for name in names if (path := Path(folder, name)).is_file() and not path.is_symlink()]
    return files + folders


def _sync(path: Path) -> None:
    """Sync a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync_descriptor(descriptor, path)
    finally:
        os.close(descriptor)


def sync_file(file: IO[Any], path: Path) -> None:
    """Flush and sync an open file, whose name is `path`, so that what was appended survives a power cut."""
    file.flush()
    _sync_descriptor(file.fileno(), path)


def _sync_descriptor(descriptor: int, path: Path) -> None:
    """Sync an open file or folder, unless its file system has no such call; every other error names `path`."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            error.filename = error.filename or str(path)
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            logger.warning(
                "the file system of %s cannot sync (%s): a power cut may damage what was just written",
                path.parent,
                error.strerror,
            )


def existing_parent(path: Path) -> Path:
    """Return the nearest existing directory at or above `path`."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def allocated(directory: Path) -> int:
    """Return the bytes that the files of a directory take on disk; unwritten parts of sparse files do not count."""
    return sum(file.stat().st_blocks * 512 for file in directory.glob("*"))


def require_space(path: Path, needed: int) -> None:
    """Raise `CheckpointError` unless the file system of `path` has `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(path)).free
    if needed > free:
        raise CheckpointError(
            f"{path} needs {needed / 1e9:.3f} GB and its file system has {free / 1e9:.3f} GB free. "
            "Nothing was written. Free some space, or choose another path."
        )
