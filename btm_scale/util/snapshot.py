"""The state of input files before a command reads them, to notice that another process changed them meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from btm_scale.errors import UserError

# Which their owner or a repeated command may rewrite, or remove.
_CARDS = ("README.md", "provenance.json", ".block_hashes.json")

_State = tuple[int, int, int]


@dataclass(frozen=True)
class Snapshot:
    """The size, modification time and inode of every file of some inputs.

    Cards, locks and partial outputs are left out. So is what does not exist: the command reports that itself.
    """

    states: Mapping[Path, _State] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Self:
        """Return the state of files and directories as they are now."""
        states = {}
        for path in paths:
            for file in _files(path):
                if (state := _state(file)) is not None:
                    states[file] = state
        return cls(states)

    @classmethod
    def joined(cls, snapshots: Iterable[Snapshot]) -> Self:
        """Return one snapshot of several inputs."""
        return cls({file: state for one in snapshots for file, state in one.states.items()})

    def require_unchanged(self, command: str, error: type[UserError]) -> None:
        """Raise `error` if a file was changed, replaced or removed since; new files do not matter."""
        for file, before in self.states.items():
            now = _state(file)
            if now != before:
                happened = "removed" if now is None else "changed"
                raise error(
                    f"{file} was {happened} while {command} read it, so the output could mix two versions, and nothing "
                    f"was written. {command} needs inputs that do not change: repeat it when they are complete."
                )


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.endswith(".partial")]
        for name in names:
            if name not in _CARDS and ".partial" not in name and not name.endswith(".lock"):
                yield Path(folder, name)


def _state(file: Path) -> _State | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
