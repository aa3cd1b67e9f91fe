"""A note in a run that its tokenizer has passed the trial, so that ranks and later commands do not repeat it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from btm_scale.run_dir import RunDir
from btm_scale.util.files import content_if_own, new_file

# A note counts only if this user alone can write it and it has the digest, inodes and change times of the files: one
# that a stranger planted or packed into a folder cannot know the latter. No environment variable can replace it.
_LIBRARIES = ("sentencepiece", "tokenizers", "transformers")
_MOST_BYTES = 1 << 16
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_noted(directory: Path, key: str, files: Sequence[str]) -> bool:
    """Return whether a process of this user noted that the tokenizer in a run's folder has passed.

    `key` has the digest of its `files`.
    """
    note = _note_of(directory)
    return note is not None and content_if_own(note, _MOST_BYTES) == _content(directory, key, files)


@contextlib.contextmanager
def noting(directory: Path, key: str, files: Sequence[str]) -> Iterator[None]:
    """Try a tokenizer in the block, and note that it passed, if it is that of a run and its files stayed the same."""
    note = _note_of(directory)
    before = _content(directory, key, files)
    yield
    if note is None or _content(directory, key, files) != before:
        return
    try:
        with new_file(note) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(before)
    except OSError as error:  # without the note, the next process tries the tokenizer again
        if error.errno not in _READ_ONLY:
            raise


def _note_of(directory: Path) -> Path | None:
    """Return the path of this user's note; None for a tokenizer outside of runs, beside which nothing is written."""
    run = RunDir(directory.absolute().parent)
    if run.tokenizer.name != directory.name or not run.config.is_file():
        return None
    return run.root / f".tokenizer-passed-{os.geteuid()}"


def _content(directory: Path, key: str, files: Sequence[str]) -> bytes:
    states = {}
    for name in files:
        with contextlib.suppress(OSError):
            status = (directory / name).stat()
            states[name] = [status.st_ino, status.st_ctime_ns]
    return json.dumps({"key": key, "files": states, "versions": {name: version(name) for name in _LIBRARIES}}).encode()
