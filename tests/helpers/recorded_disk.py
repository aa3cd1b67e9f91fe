"""Record every state of a folder that a command goes through: its names and contents, and which of them were synced."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.disk_events import watch

_SETTLED_SECONDS = 0.1  # the time of a file's last change is coarse


@contextlib.contextmanager
def recorded(root: str, folder: str) -> Iterator[None]:
    """Append the states of `root` to `folder/journal` until the process ends. Forked processes append too."""
    recorder = _Recorder(Path(root), Path(folder))
    recorder.note("begin", root)
    watch(Path(root), recorder.note, recorder.note_sync)
    try:
        yield
    finally:
        recorder.note("end", root)


class _Recorder:
    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._folder = folder
        self._digests: dict[tuple[int, int, int], str] = {}
        self._lock = threading.RLock()
        (folder / "contents").mkdir(parents=True)

    def note(self, event: str, path: str, synced: Any = None) -> None:
        """Record the folder as it is now, before an event."""
        with self._lock, (self._folder / "journal").open("a") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            tree = self._tree()
            inode = self._root.stat().st_ino
            row = {"event": event, "path": path, "root": inode, "tree": tree, "synced": synced}
            journal.write(json.dumps(row) + "\n")

    def note_sync(self, descriptor: int) -> None:
        """Record what a sync made durable: the content of a file or the names in a folder."""
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(descriptor) as entries:
                synced: Any = [status.st_ino, {entry.name: entry.inode() for entry in entries}]
        else:
            synced = [status.st_ino, self._kept(Path(f"/proc/self/fd/{descriptor}").read_bytes())]
        self.note("synced", "", synced)

    def _tree(self) -> dict[str, list[Any]]:
        """Return each path below the root with its inode and its content, None for a folder."""
        while True:
            # Another thread or process may rename a file between the listing and its reading. The listing then has the
            # file under neither name, a state that never was on the disk, so list again.
            with contextlib.suppress(FileNotFoundError):
                return dict(self._listed(self._root, ""))

    def _listed(self, folder: Path, prefix: str) -> Iterator[tuple[str, list[Any]]]:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield name, [entry.inode(), None]
                yield from self._listed(folder / entry.name, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name, [entry.inode(), self._content(folder / entry.name)]

    def _content(self, path: Path) -> str:
        status = path.stat()
        key = status.st_ino, status.st_mtime_ns, status.st_size
        if key in self._digests:
            return self._digests[key]
        digest = self._kept(path.read_bytes())
        if time.time() - status.st_mtime > _SETTLED_SECONDS:
            self._digests[key] = digest
        return digest

    def _kept(self, content: bytes) -> str:
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        path = self._folder / "contents" / digest
        if not path.exists():
            path.write_bytes(content)
        return digest
