"""The journal of a domain that is being encoded, from which an interrupted `prepare` resumes.

The token files grow in the domain's unpublished folder. After each shard of text the journal gets a file with the
documents of the shard and a digest of the tokens that they added to each token file. To resume, the text is read again,
which takes a fraction of the time of encoding it, and each document must be the next one of the journal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.run_dir import SPLITS
from btm_scale.util.bounded_json import parse_json
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import is_private, make_partial, partial_path, publish_directory, write_file

logger = logging.getLogger(__name__)

SHARD_BYTES = 32_000_000  # of text
DOCUMENT = np.dtype([("split", "u1"), ("key", "<u8"), ("tokens", "<i4")])
_FOLDER, _MADE_FROM = "journal", "made_from"
_DIGEST_BYTES = 1 << 22  # that are read at a time


@dataclass(frozen=True)
class Shard:
    """Consecutive documents of a domain, an array of dtype DOCUMENT.

    `ends` has the size of each token file after them, in bytes; `digests` the SHA-256 of what they added to it, in hex.
    """

    documents: np.ndarray[Any, Any]
    ends: Mapping[str, int]
    digests: Mapping[str, str]
    masks: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """For conversations, the size and digest of each mask file."""


class Journal:
    """The complete shards of a domain, in order. `made_from`: what the tokens depend on beside the text, as JSON."""

    def __init__(self, folder: Path, made_from: str) -> None:
        self._folder = folder
        self._shards = folder / _FOLDER
        self._made_from = made_from
        self._count = 0
        self.resumed: list[Shard] = []
        """The shards that an interrupted process completed."""

    @property
    def ends(self) -> Mapping[str, int]:
        """The size of each token file after the resumed shards, in bytes."""
        return self.resumed[-1].ends if self.resumed else dict.fromkeys(SPLITS, 0)

    @property
    def mask_ends(self) -> Mapping[str, int]:
        """The size of each mask file after the resumed shards; empty unless documents are conversations."""
        return {split: end for split, (end, _) in self.resumed[-1].masks.items()} if self.resumed else {}

    @property
    def is_empty(self) -> bool:
        """Whether no shard is complete."""
        return not self._count

    def can_resume(self) -> bool:
        """Return whether the folder is this user's alone, and its journal is of the same tokenizer and settings."""
        note = self._shards / _MADE_FROM
        return is_private(self._folder) and note.is_file() and note.read_bytes() == self._made_from.encode()

    def read(self) -> None:
        """Read the shards up to the first one that is damaged, or whose tokens are."""
        while self._path(self._count).is_file():
            shard = self._read_shard(self._path(self._count))
            if shard is None:
                logger.warning("%s or its tokens are damaged: they are encoded again", self._path(self._count))
                return
            self.resumed.append(shard)
            self._count += 1

    def add(self, shard: Shard) -> None:
        """Publish a shard whose tokens have been written."""
        if self.is_empty:
            self._shards.mkdir(exist_ok=True)
            write_file(self._shards / _MADE_FROM, self._made_from)
        records = shard.documents.tobytes()
        content = {"ends": shard.ends, "digests": shard.digests, "documents": hashlib.sha256(records).hexdigest()}
        content |= {"marks": shard.masks} if shard.masks else {}
        write_file(self._path(self._count), json.dumps(content).encode() + b"\n" + records)
        self._count += 1

    def _path(self, number: int) -> Path:
        return self._shards / f"shard-{number:06d}"

    def _read_shard(self, path: Path) -> Shard | None:
        begins = self.ends
        try:
            head, _, records = path.read_bytes().partition(b"\n")
            content = parse_json(head)
            documents = np.frombuffer(records, DOCUMENT)
            shard = Shard(documents, content["ends"], content["digests"], content.get("marks", {}))
            before = self.resumed[-1].masks if self.resumed else {}
            for split, (end, digest) in shard.masks.items():
                begin = before[split][0] if split in before else 0
                if _digest(self._folder / f"{split}.mask", begin, end) != digest:
                    return None
            is_intact = hashlib.sha256(records).hexdigest() == content["documents"] and all(
                _digest(self._folder / f"{split}.bin", begins[split], shard.ends[split]) == shard.digests[split]
                for split in SPLITS
            )
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return shard if is_intact else None


def _digest(path: Path, begin: int, end: int) -> str:
    """Return the digest of a part of a file. Raises ValueError if the file is shorter."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        left = end - begin
        while left > 0:
            part = file.read(min(left, _DIGEST_BYTES))
            if not part:
                raise ValueError("truncated")
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


class TextChangedError(Exception):
    """The documents that are read are not those of the journal."""


class Replay:
    """The documents of a journal, to which those that are read again are compared."""

    def __init__(self, journal: Journal) -> None:
        self.left = sum(len(shard.documents) for shard in journal.resumed)
        self._documents = (document for shard in journal.resumed for document in shard.documents.tolist())

    def take(self, split: str, key: int) -> int:
        """Return the number of tokens of the next document. Raises TextChangedError if it has another split or key."""
        recorded_split, recorded_key, tokens = next(self._documents)
        if (recorded_split, recorded_key) != (SPLITS.index(split), key):
            raise TextChangedError
        self.left -= 1
        return int(tokens)


@contextlib.contextmanager
def resumable_directory(final: Path, made_from: str) -> Iterator[tuple[Path, Journal]]:
    """Make a directory that is published as `final` when the block ends, with the journal in it.

    If the block is interrupted or raises, for example because the disk is full, the directory stays, and the next call
    resumes from it, provided that its journal has a shard of this text. Raises CheckpointError if `final` exists with
    content.
    """
    temporary = partial_path(final)
    journal = Journal(temporary, made_from)
    if journal.can_resume():
        journal.read()
    else:
        make_partial(temporary)
    try:
        with writing(final):
            yield temporary, journal
            publish_directory(temporary, final)
    except BaseException as error:
        if journal.is_empty or isinstance(error, TextChangedError):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    remove_journal(final)


def remove_journal(folder: Path) -> None:
    """Remove the journal of a published folder, where it is no longer needed."""
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def is_resumable(partial: Path) -> bool:
    """Return whether an unpublished directory has a journal, and only this user can write to it."""
    return is_private(partial) and (partial / _FOLDER / _MADE_FROM).is_file()
