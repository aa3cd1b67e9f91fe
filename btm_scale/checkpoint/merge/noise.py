"""Random numbers that belong to a place: the same for any order, chunk or process that asks for them."""

from __future__ import annotations

import hashlib

import torch


def uniform(key: str, start: int, stop: int) -> torch.Tensor:
    """float64 in [0, 1) for the elements `[start, stop)` of the stream that `key` names.

    A counter through the SplitMix64 finaliser (Steele, Lea and Flood 2014), in int64 that wraps around.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    state = torch.arange(start, stop, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15) + seed
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """The shift that fills with zeros, which torch's own does not for negative numbers."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
