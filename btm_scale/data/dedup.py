"""Deduplication: a text is kept once per domain, and in only one split across all domains."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.sources import DomainSource
from btm_scale.data.splits import Identity, Placement
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS, RunDir


class KeySet:
    """A set of uniformly distributed 64-bit keys in one open-addressing table of 12 to 24 bytes per key.

    A Python set takes 75 to 80 bytes per key, four to five times as much. A sorted array beside a small set of recent
    keys takes 12 to 18, but twice the time per key. The chance that any two of a billion different texts share a key,
    and one of them is dropped, is 3%.
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
        """Add a key; returns False if it was in the set already."""
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
    """Drops texts that are already in their domain, or in another split of any domain.

    `elsewhere`: keys by split in other domains' token files. `held_out`: keys by split of this domain's own dev and
    test; if split keys place a text in two splits, it is kept in the stricter one.
    """

    def __init__(self, elsewhere: Mapping[str, KeySet], held_out: Mapping[str, KeySet]) -> None:
        self._elsewhere = elsewhere
        self._held_out = held_out
        self._seen = KeySet()
        self.dropped = 0

    def keep(self, identity: Identity) -> bool:
        """Return whether to keep a document in its split; those that are not kept are counted in `dropped`."""
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


def held_out_keys(identities: Iterable[Identity]) -> dict[str, KeySet]:
    """Return the keys of a domain's documents in dev and test."""
    held_out = {split: KeySet() for split in ("dev", "test")}
    for identity in identities:
        if identity.split in held_out:
            held_out[identity.split].add(identity.key)
    return held_out


def keys_elsewhere(
    source: DomainSource, sources: Sequence[DomainSource], run: RunDir, placement: Placement
) -> dict[str, KeySet]:
    """Return the keys by split of the documents in the finished token files of the other `sources`.

    Empty if every domain places documents by their text: equal texts then fall into the same split everywhere.
    """
    others = [other for other in sources if other.name != source.name and run.fingerprint(other.name).exists()]
    is_usual = not placement.name and not any(Fingerprint.of_domain(run, other.name).placement for other in others)
    if is_usual and not any(domain.is_grouped for domain in (source, *others)):
        return {}
    keys = {split: KeySet() for split in SPLITS}
    for other in others:
        for split in SPLITS:
            for key in _load_keys(run.domain(other.name), split):
                keys[split].add(int(key))
    return keys


def save_keys(folder: Path, keys: Mapping[str, array[int]]) -> None:
    """Write the keys of each split's documents beside its token files."""
    for split, values in keys.items():
        keys_of_split = np.frombuffer(values, dtype=np.uint64)
        with _keys_file(folder, split).open("wb") as file:  # np.save hides why a write failed
            header = np.lib.format.header_data_from_array_1_0(keys_of_split)
            np.lib.format.write_array_header_1_0(file, header)
            file.write(keys_of_split.data)


def _load_keys(folder: Path, split: str) -> np.ndarray:
    """Return the keys of a split's documents. Raises DataError if they are missing or damaged."""
    path = _keys_file(folder, split)
    try:
        keys = np.load(path, mmap_mode="r")
        problem = None if keys.dtype == np.uint64 and keys.ndim == 1 else f"{keys.dtype} {list(keys.shape)}"
    except (OSError, ValueError, EOFError) as error:
        problem = str(error) or type(error).__name__
    if problem is not None:
        raise DataError(
            f"{path} has no keys of documents ({problem}), and must be an array of uint64. Copy it again, or delete "
            f"{folder} and prepare the run again."
        )
    return keys


def _keys_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.keys.npy"
