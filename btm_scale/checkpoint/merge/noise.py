"""Counter-based random numbers: an element's number does not depend on order, chunks or processes."""

from __future__ import annotations

import hashlib

import numpy as np


def uniform(key: str, start: int, stop: int) -> np.ndarray:
    """Return float64 numbers in [0, 1) for the elements `[start, stop)` of the stream called `key`.

    The SplitMix64 finalizer (Steele, Lea and Flood 2014) of a counter, in uint64 arithmetic that wraps around.
    """
    state = np.arange(start, stop, dtype=np.uint64)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    state >>= np.uint64(11)
    return state.astype(np.float64) * 2.0**-53
