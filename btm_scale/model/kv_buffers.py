"""KV caches with room for the next tokens, for transformers' models.

transformers' own cache copies every key and value for each token that it appends.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from btm_scale.model.hf_load import new_cache

_LEAST_ROOM = 64  # positions
_KINDS: dict[type, type] = {}


class GrowingLayer:
    """The keys and values of one layer, [batch, heads, positions, size], as views of larger buffers.

    It replaces methods of transformers' `DynamicLayer`.
    """

    keys: Tensor
    values: Tensor
    is_initialized: bool
    _buffers: tuple[Tensor, Tensor] | None = None
    _views: tuple[Tensor, Tensor] | None = None  # what `update` returned last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with no position; keys and values may be set from outside afterwards."""
        super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        self._buffers = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append positions, and return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, count = self.keys.shape[-2] if self.keys.ndim == 4 else 0, key_states.shape[-2]
        end, buffers = begin + count, self._buffers
        if buffers is None or end > buffers[0].shape[2] or not self._has_views():
            buffers = self._buffers = self._grown(key_states, value_states, begin, end)
        keys, values = buffers
        keys.narrow(2, begin, count).copy_(key_states)
        values.narrow(2, begin, count).copy_(value_states)
        self.keys, self.values = self._views = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self._views

    def _has_views(self) -> bool:
        """Return whether keys and values are those of the buffers, and were not replaced since."""
        return self._views is not None and self.keys is self._views[0] and self.values is self._views[1]

    def _grown(self, key_states: Tensor, value_states: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        room = end + max(_LEAST_ROOM, end // 4)
        buffers = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            buffer = states.new_empty(*states.shape[:2], room, states.shape[3])
            if begin:
                buffer[:, :, :begin] = held
            buffers.append(buffer)
        return buffers[0], buffers[1]


def empty_cache(model: Any) -> Any:
    """Return an empty KV cache for a model; sliding windows keep transformers' own layers."""
    cache = new_cache(model)
    cache.layers = [
        _growing(type(layer)) if type(layer).__name__ == "DynamicLayer" else layer for layer in cache.layers
    ]
    return cache


def is_growing(cache: Any) -> bool:
    """Return whether every layer of a cache keeps all positions in buffers."""
    return bool(cache.layers) and all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def _growing(kind: type) -> Any:
    """Return a layer that is of transformers' class too, which its caches expect."""
    if kind not in _KINDS:
        _KINDS[kind] = type("GrowingDynamicLayer", (GrowingLayer, kind), {})
    return _KINDS[kind]()
