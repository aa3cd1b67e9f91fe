"""A disk that loses everything not fsynced: which files would be complete after a power cut."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Tracks this process's fsyncs and renames below `root`, whose current content counts as durable.

    Stricter than most file systems: a file's bytes are durable once the file is fsynced, and its name once its folder
    is. Names that begin with a dot are temporary.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.syncs = 0
        self.torn: list[str] = []  # renamed to a final name before it was durable
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._open: list[int] = []
        self._lock = threading.Lock()
        for path in (root, *root.rglob("*")):
            self._keep(os.open(path, os.O_RDONLY))
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._sync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._checked(getattr(os, name)))

    def written(self) -> dict[str, bytes]:
        """Return the content of every file with a final name, by its path below the root."""
        files = (path for path in self.root.rglob("*") if path.is_file() and not self._is_temporary(path))
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}

    def durable(self) -> dict[str, bytes]:
        """Return what `written` would return after a power cut."""
        return dict(self._survivors(self.root.stat().st_ino, ""))

    def close(self) -> None:
        """Close the files that are kept open."""
        for descriptor in self._open:
            os.close(descriptor)

    def _sync(self, descriptor: Any) -> None:
        self.syncs += 1
        self._keep(os.dup(descriptor))

    def _keep(self, descriptor: int) -> None:
        # Kept open, so that its inode is not reused.
        status = os.fstat(descriptor)
        with self._lock:
            self._open.append(descriptor)
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(descriptor) as entries:
                    self._names[status.st_ino] = {entry.name: entry.inode() for entry in entries}
            else:
                self._bytes[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _survivors(self, folder: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        for name, inode in self._names.get(folder, {}).items():
            if name.startswith("."):
                continue
            if inode in self._names:
                yield from self._survivors(inode, f"{prefix}{name}/")
            else:
                yield f"{prefix}{name}", self._bytes.get(inode, b"")

    def _checked(self, rename: Any) -> Any:
        def checked(source: Any, target: Any) -> None:
            path = Path(source)
            if not self._is_temporary(Path(target)):
                self.torn += [str(part) for part in (path, *path.rglob("*")) if not self.is_durable(part)]
            rename(source, target)

        return checked

    def is_durable(self, path: Path) -> bool:
        """Whether a file's current bytes, or a folder's current names, are fsynced."""
        inode = path.stat().st_ino
        if path.is_dir():
            return set(self._names.get(inode, {})) == {child.name for child in path.iterdir()}
        return self._bytes.get(inode) == path.read_bytes()

    def _is_temporary(self, path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(self.root).parts)
