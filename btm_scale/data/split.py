"""Which split a document falls in, and whether its text was seen before: both by hash, so that adding files
moves nothing."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from btm_scale.data.sources import Document
from btm_scale.run_dir import SPLITS


@dataclass(frozen=True)
class Identity:
    """A document's split, and its text's digest [16 bytes] and size in UTF-8 bytes."""

    split: str
    digest: bytes
    bytes: int

    @property
    def key(self) -> int:
        """64 bits of the digest; equal texts have equal keys."""
        return int.from_bytes(self.digest[8:], "little")


def identify(document: Document, *, dev: float, test: float) -> Identity:
    """Place a document by the hash of its group, or of its text if it has none.

    `dev` and `test` are shares of the hash range. Equal texts (or groups) fall into the same split in every
    domain and every run.
    """
    text = document.text.encode()
    digest = decisive = hashlib.blake2b(text, digest_size=16).digest()
    if document.group is not None:
        decisive = hashlib.blake2b(document.group.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(decisive[:8], "little") / 2.0**64
    split = "test" if place < test else "dev" if place < test + dev else "train"
    return Identity(split, digest, len(text))


class TextDigest:
    """One digest of a stream of documents, their order and groups."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, identity: Identity, document: Document) -> None:
        """Take in the next document."""
        self._total.update(identity.digest + repr(document.group).encode())

    def hexdigest(self) -> str:
        """The digest of what was taken in."""
        return self._total.hexdigest()


class KeySet:
    """A set of 64-bit keys at 12 to 24 bytes a key, where a Python set takes over 100.

    Two of a billion texts share a key by chance with probability 3%; one of them is then dropped.
    """

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0
        for key in keys:
            self.add(key)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        key = key or 1
        return self._slots[self._slot(key)] == key

    def add(self, key: int) -> bool:
        """Add a key; false if it was there."""
        key = key or 1  # 0 marks an empty slot
        slot = self._slot(key)
        if self._slots[slot] == key:
            return False
        self._slots[slot] = key
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            self._grow()
        return True

    def _slot(self, key: int) -> int:
        slots, mask = self._slots, len(self._slots) - 1
        slot = key & mask
        while slots[slot] not in (0, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        full, self._slots = self._slots, array("Q", bytes(16 * len(self._slots)))
        for key in full:
            if key:
                self._slots[self._slot(key)] = key


class Deduplicator:
    """Drops a text that its domain has had before, and one that another split holds, here or elsewhere.

    `elsewhere`: keys by split of other domains' token files. `held_out`: keys by split of this domain's own
    dev and test; a text that stands on both sides of a split by groups stays on the stricter one.
    """

    def __init__(self, elsewhere: dict[str, KeySet], held_out: dict[str, KeySet]) -> None:
        self._elsewhere = elsewhere
        self._held_out = held_out
        self._seen = KeySet()
        self.dropped = 0

    def keep(self, identity: Identity) -> bool:
        """Whether a document goes into its split; each that does not is counted."""
        key, split = identity.key, identity.split
        stricter = SPLITS[SPLITS.index(split) + 1 :]
        if (
            any(key in keys for other, keys in self._elsewhere.items() if other != split)
            or any(key in self._held_out[other] for other in stricter if other in self._held_out)
            or not self._seen.add(key)
        ):
            self.dropped += 1
            return False
        return True
