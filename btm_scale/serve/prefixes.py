"""A bounded cache of prompts that were read, so that the next turn of a chat reads only what is new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.model.hf_decoder import Prefix

LEAST_TOKENS = 64


@dataclass(frozen=True)
class CachedPrefix:
    """The beginning of a prompt that every model has read."""

    tokens: int
    models: Mapping[str, Prefix]


@dataclass(frozen=True)
class _Entry:
    prompt: np.ndarray  # int64 [tokens]
    models: Mapping[str, Prefix]
    nbytes: int


class PrefixCache:
    """The KV caches and scores of prompts, by use, in at most `max_bytes`."""

    def __init__(self, max_bytes: float, *, least_tokens: int = LEAST_TOKENS) -> None:
        """`least_tokens`: shorter prompts are not kept, since reading them again costs less than a copy."""
        self._max_bytes, self._least = max_bytes, least_tokens
        self._entries: list[_Entry] = []  # least recently used first

    @property
    def nbytes(self) -> int:
        """The bytes of all KV caches that are kept."""
        return sum(entry.nbytes for entry in self._entries)

    def find(self, names: Sequence[str], prompt: Sequence[int]) -> CachedPrefix | None:
        """Return the longest known beginning of a prompt that is worth resuming from: at least half of it."""
        if len(prompt) < self._least or not self._entries:
            return None
        ids = np.asarray(prompt, dtype=np.int64)
        suitable = [entry for entry in self._entries if all(name in entry.models for name in names)]
        if not suitable:
            return None
        lengths = [_common(entry.prompt, ids) for entry in suitable]
        best = int(np.argmax(lengths))
        # The last common token is read again: it gives the logits that score the next one.
        tokens = lengths[best] - 1
        if tokens < max(self._least - 1, len(prompt) // 2):
            return None
        entry = suitable[best]
        self._entries = [*(other for other in self._entries if other is not entry), entry]
        return CachedPrefix(tokens, {name: entry.models[name] for name in names})

    def keep(self, prompt: Sequence[int], models: Mapping[str, Prefix], max_bytes: float) -> None:
        """Add a prompt, replace those that it continues, and drop the least recently used beyond `max_bytes`.

        A prompt that is not accepted changes nothing, since it would take the place of all others and not stay itself.
        """
        ids = np.asarray(prompt, dtype=np.int64)
        entry = _Entry(ids, dict(models), sum(prefix.nbytes for prefix in models.values()))
        if self.accepts(len(prompt), entry.nbytes, max_bytes):
            others = [other for other in self._entries if not _continues(entry, other)]
            self._entries = [*others, entry]
            self.shrink(max_bytes)

    def accepts(self, tokens: int, nbytes: int, max_bytes: float) -> bool:
        """Whether a prompt of this many tokens, whose KV caches take `nbytes` of at most `max_bytes`, is kept."""
        limit = min(max_bytes, self._max_bytes)
        return tokens >= self._least and nbytes <= limit and limit > 0

    def shrink(self, max_bytes: float) -> None:
        """Drop the least recently used prompts until the others take at most `max_bytes`, or the limit of the cache."""
        limit, used = min(max_bytes, self._max_bytes), self.nbytes
        while self._entries and used > limit:
            used -= self._entries.pop(0).nbytes


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many first tokens are equal."""
    length = min(len(one), len(other))
    unequal = np.flatnonzero(one[:length] != other[:length])
    return int(unequal[0]) if len(unequal) else length


def _continues(entry: _Entry, other: _Entry) -> bool:
    return set(other.models) <= set(entry.models) and _common(entry.prompt, other.prompt) == len(other.prompt)
