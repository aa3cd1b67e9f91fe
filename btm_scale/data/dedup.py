"""Texts that a domain, or another split, has had before are dropped."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from btm_scale.data.splits import Identity
from btm_scale.run_dir import SPLITS


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
