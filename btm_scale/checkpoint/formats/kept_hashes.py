"""Hashes of blocks, kept beside the weights that were hashed, so that a merge need not hash what it only copies.

They count only for the files that were hashed. One that was copied, replaced, written to or touched since has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Self

from btm_scale.errors import UserError
from btm_scale.util.records import Record

NAME = ".block_hashes.json"

State = tuple[int, int, int, int]
"""A file's size, inode, and nanoseconds of its last modification and change."""


class KeptHashes(Record):
    """.block_hashes.json: the states of a model's weight files, and the hashes of each tensor's blocks, in order."""

    files: dict[str, State]
    blocks: dict[str, tuple[str, ...]]
    digest: str  # of both, because they are used without reading what was hashed

    @classmethod
    def of(cls, files: Mapping[str, State], blocks: Mapping[str, Sequence[str]]) -> Self:
        """Describe files by their states before they were hashed, so that a change meanwhile makes them others."""
        hashes = {name: tuple(each) for name, each in blocks.items()}
        return cls(files=dict(files), blocks=hashes, digest=_digest(files, hashes))


def kept_hashes(directory: Path, files: Iterable[Path]) -> Mapping[str, Sequence[str]]:
    """Return the hashes of each tensor's blocks, or nothing if they are not known of these files as they are now."""
    try:
        kept = KeptHashes.load(directory / NAME)
        is_current = kept.files == states_of(directory, files) and kept.digest == _digest(kept.files, kept.blocks)
    except (UserError, OSError):  # none, or damaged: what needs hashes can always compute them
        return {}
    return kept.blocks if is_current else {}


def states_of(directory: Path, files: Iterable[Path]) -> dict[str, State]:
    """Return the states of files in a directory as they are now, by their paths there."""
    states = ((str(file.relative_to(directory)), file.stat()) for file in files)
    return {name: (one.st_size, one.st_ino, one.st_mtime_ns, one.st_ctime_ns) for name, one in states}


def _digest(files: Mapping[str, Sequence[int]], blocks: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps([files, blocks], sort_keys=True).encode()).hexdigest()
