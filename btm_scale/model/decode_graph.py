"""Decoding steps of fixed shapes and addresses, which a GPU replays as one CUDA graph.

A step appends one token to every row of a batch. Its KV cache has room for a fixed number of rows and positions, and
all that changes from step to step is on the device: no launch needs the host.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from btm_scale.model.hf_load import new_cache
from btm_scale.model.kv_buffers import empty_cache, is_growing

if TYPE_CHECKING:
    from btm_scale.model.hf_decoder import Decoder

logger = logging.getLogger(__name__)

_LEAST_POSITIONS = 256
_KEPT = 3  # buckets of a decoder, each with a KV cache


class FixedLayer:
    """The keys and values of one layer, [rows, heads, capacity, size]; a token is written to column `column`."""

    is_sliding = False
    is_compileable = True
    is_initialized = True

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        self.keys, self.values, self._column = keys, values, column

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the column of one token; return all columns, of which the mask hides those that are not written."""
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return 0: positions and mask are given to the model."""
        return 0

    def get_max_length(self) -> int:
        """Return the number of columns."""
        return self.keys.shape[2]

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """Return the number of columns, and the first of them."""
        return self.keys.shape[2], 0


class DecodeStep:
    """The step of one bucket: `batch` sequences under each model of a decoder, of at most `capacity` tokens."""

    def __init__(self, decoder: Decoder, cache: Any, batch: int, capacity: int) -> None:
        """Allocate a cache with the heads, sizes and dtype of `cache`."""
        device, rows = decoder.model.device, decoder.models * batch
        self._decoder, self.batch, self.capacity = decoder, batch, capacity
        self.version = decoder.weights_version  # of the weights that the graph reads
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        # What attention adds to its scores; a mask of booleans would be converted in every layer.
        self.bias = cache.layers[0].keys.new_full((rows, capacity), -float("inf"))
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, decoder.vocabulary, device=device)
        self.cache = new_cache(decoder.model)
        self.cache.layers = [
            FixedLayer(self._room_for(layer.keys), self._room_for(layer.values), self.column) for layer in cache.layers
        ]
        self._graph = _captured(self.run) if device.type == "cuda" else None
        self._owner: weakref.ref[object] | None = None

    def _room_for(self, states: Tensor) -> Tensor:
        return states.new_zeros(len(self.tokens), states.shape[1], self.capacity, states.shape[3])

    @torch.inference_mode()
    def run(self) -> None:
        """Append `tokens` to the rows, and set `logits`. Reads and writes only what is on the device."""
        self.bias.index_fill_(1, self.column, 0.0)
        logits = self._decoder.logits(
            self.tokens, mask=self.bias[:, None, None, :], positions=self.positions, cache=self.cache, keep=1
        )
        self.logits.copy_(logits[:, -1])
        self.column.add_(1)
        # Finished sequences are fed along with the others; their positions must stay valid.
        self.positions.add_(1).clamp_(max=self._decoder.positions - 1)

    def feed(self, tokens: Tensor) -> Tensor:
        """Append tokens, int64 [batch of the owner]; return the logits of its rows, [models x batch, vocabulary]."""
        batch = len(tokens)
        self.tokens.view(-1, self.batch)[:, :batch] = tokens
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()
        return self.logits.view(-1, self.batch, self.logits.shape[1])[:, :batch].flatten(0, 1)

    @property
    def is_free(self) -> bool:
        """Whether no reading uses the cache."""
        return self._owner is None or self._owner() is None

    def take(self, owner: object, cache: Any, mask: Tensor) -> None:
        """Continue the rows [models x batch] of a cache, whose columns have a mask [models x batch, columns]."""
        self._owner = weakref.ref(owner)
        columns = mask.shape[1]
        batch = len(mask) // self._decoder.models
        for layer, source in zip(self.cache.layers, cache.layers, strict=True):
            for name in ("keys", "values"):
                held, states = getattr(layer, name), getattr(source, name)
                # Not a number that a text has left behind would reach others, whatever the mask.
                held.zero_()
                held.unflatten(0, (-1, self.batch))[:, :batch, :, :columns] = states.unflatten(0, (-1, batch))
        by_model = mask.unflatten(0, (-1, batch))
        hidden = torch.zeros_like(by_model, dtype=self.bias.dtype).masked_fill_(~by_model, -float("inf"))
        self.bias.fill_(-float("inf")).view(-1, self.batch, self.capacity)[:, :batch, :columns] = hidden
        read = by_model.sum(2).clamp_(0, self._decoder.positions - 1)
        self.positions.zero_().view(-1, self.batch)[:, :batch] = read
        self.column.fill_(columns)

    def free(self) -> None:
        """Let other readings use the cache."""
        self._owner = None

    def release(self, batch: int, columns: int) -> Any:
        """Return a cache of the owner's `batch` sequences, which have this many columns, and free this one."""
        self.free()
        cache = empty_cache(self._decoder.model)
        for layer, source in zip(cache.layers, self.cache.layers, strict=True):
            keys, values = (
                states.unflatten(0, (-1, self.batch))[:, :batch, :, :columns].flatten(0, 1).clone()
                for states in (source.keys, source.values)
            )
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache


class DecodeSteps:
    """The steps of a decoder by bucket: powers of two of sequences and of positions."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = weakref.proxy(decoder)
        self._steps: dict[tuple[int, int], DecodeStep] = {}  # least recently used first
        self._is_refused = False
        self.is_checked = False

    def take(self, owner: object, cache: Any, mask: Tensor) -> DecodeStep | None:
        """Return the step that continues the rows of a cache; None if there is none, or if another reading has it."""
        if self._is_refused or not is_growing(cache):
            return None
        batch, columns = len(mask) // self._decoder.models, mask.shape[1]
        bucket = _power_of_two(batch), _power_of_two(max(columns + 1, _LEAST_POSITIONS))
        step = self._steps.pop(bucket, None)
        if step is None:
            step = self._made(cache, bucket)
            if step is None:
                return None
        self._steps[bucket] = step
        if not step.is_free:
            return None
        while len(self._steps) > _KEPT:
            del self._steps[next(iter(self._steps))]
        step.take(owner, cache, mask)
        return step

    def accepts(self, logits: Tensor, expected: Tensor) -> bool:
        """Return whether the first step predicts what the model's own forward pass does; otherwise, none is used.

        Some families compute positions or masks in their own way.
        """
        self.is_checked = True
        rounding = self._decoder.rounding
        pair = logits.log_softmax(1), expected.log_softmax(1)
        if not torch.allclose(*pair, rtol=rounding, atol=rounding, equal_nan=True):
            self._refuse()
        return not self._is_refused

    def _refuse(self) -> None:
        """Make no more steps, and free the KV caches and graphs of those that no reading uses."""
        self._is_refused = True
        self._steps.clear()

    def _made(self, cache: Any, bucket: tuple[int, int]) -> DecodeStep | None:
        try:
            return DecodeStep(self._decoder, cache, *bucket)
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:  # of a model whose forward pass cannot be captured
            self._refuse()
            logger.warning("Decoding runs without a CUDA graph, which is slower: %s", str(error).partition("\n")[0])
            return None


def _captured(run: Any) -> Any:
    """Return the CUDA graph of a function, after the runs that libraries need to allocate their workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
