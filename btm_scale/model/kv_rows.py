"""Sequences that join and leave a batch: rows of transformers' KV caches, which end at the same position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def selected_rows(cache: Any, empty: Any, rows: Tensor, columns: int) -> Any:
    """Fill the cache `empty` with the last `columns` positions of some rows [rows], and return it."""
    for source, target in zip(cache.layers, empty.layers, strict=True):
        _fill(target, source.keys[rows], source.values[rows], columns)
    return empty


def joined_rows(cache: Any, other: Any, empty: Any, columns: int, models: int = 1) -> Any:
    """Fill the cache `empty` with the rows of two, left-padded to `columns` positions, and return it.

    The rows are those of `models` models, one after the other, and each model's are joined.
    """
    for first, second, target in zip(cache.layers, other.layers, empty.layers, strict=True):
        width = max(first.keys.shape[2], second.keys.shape[2])
        keys, values = (
            torch.cat(
                [_padded(getattr(layer, name), width).unflatten(0, (models, -1)) for layer in (first, second)], dim=1
            ).flatten(0, 1)
            for name in ("keys", "values")
        )
        _fill(target, keys, values, columns)
    return empty


def leading_positions(caches: Sequence[Any], empty: Any, positions: int) -> Any:
    """Fill the cache `empty` with the first positions of others without sliding windows, row by row, and return it."""
    for target, *sources in zip(empty.layers, *(cache.layers for cache in caches), strict=True):
        keys, values = (
            torch.cat([getattr(source, name)[:, :, :positions] for source in sources]) for name in ("keys", "values")
        )
        _fill(target, keys, values, positions)
    return empty


def has_all_positions(cache: Any) -> bool:
    """Whether a cache has every position; sliding windows drop the first ones."""
    return not any(layer.is_sliding for layer in cache.layers)


def bytes_of(cache: Any) -> int:
    """Return the memory that a cache's keys and values take."""
    return sum(states.untyped_storage().nbytes() for layer in cache.layers for states in (layer.keys, layer.values))


def bytes_of_row(cache: Any) -> int:
    """Return the memory that a copy of one row takes."""
    return sum(states[0].nbytes for layer in cache.layers for states in (layer.keys, layer.values))


def _fill(layer: Any, keys: Tensor, values: Tensor, columns: int) -> None:
    """Set a layer's keys and values [batch, heads, positions, size]. A sliding window has fewer than `columns`."""
    layer.lazy_initialization(keys, values)
    kept = slice(max(0, keys.shape[2] - columns), None)
    layer.keys, layer.values = keys[:, :, kept], values[:, :, kept]
    if layer.is_sliding:
        layer.cumulative_length = columns


def _padded(states: Tensor, width: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
