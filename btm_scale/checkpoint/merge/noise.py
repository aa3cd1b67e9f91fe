"""Counter-based random numbers: an element's number does not depend on order, chunks or processes."""

from __future__ import annotations

import hashlib

import torch


def uniform(key: str, start: int, stop: int) -> torch.Tensor:
    """Return float64 numbers in [0, 1) for the elements `[start, stop)` of the stream called `key`.

    The SplitMix64 finalizer (Steele, Lea and Flood 2014) of a counter, in int64 arithmetic that wraps around.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    state = torch.arange(start, stop, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + seed
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the logical right shift; torch's is arithmetic for negative numbers."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
