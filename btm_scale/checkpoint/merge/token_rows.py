"""Read the rows of a model's embedding and LM head in the order of another vocabulary, by ranges."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np

from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec
from btm_scale.util.imports import torch

_TOKEN_TENSOR = re.compile(
    r"(?:.*\.)?(?:embed_tokens(?:_per_layer)?|wte|embed_in|word_embeddings|tok_embeddings|lm_head|embed_out)"
    r"\.(?:weight|bias)|(?:model\.)?(?:shared|output)\.weight"
)
_BLOCK_ROWS = 1024  # that are summed at a time for a mean


def is_token_tensor(name: str) -> bool:
    """Whether a tensor, by its name, has one row per token: an embedding or an LM head."""
    return _TOKEN_TENSOR.fullmatch(name) is not None


@dataclass(frozen=True)
class TokenRows:
    """For every row of the output, the row of each model with the same token.

    A model that lacks the token gets zeros if `zero`. Otherwise it gets the row of the base, or without one the mean
    of the rows of the models that have it, or else the mean of all its rows.
    """

    choice: str  # `union`, `base` or a path
    reference: Path  # the tokenizer of the output, or what is extended
    order: tuple[Path, ...]  # of the models, as they were given
    sources: Mapping[Path, np.ndarray] = field(compare=False)  # int64 [rows], -1 where the token is lacking
    is_token: np.ndarray = field(compare=False)  # bool [rows]; others are padding
    base: Path | None
    zero: bool
    tokens_digest: str  # of the output's vocabulary

    @property
    def rows(self) -> int:
        """Number of rows of the output's embedding."""
        return len(self.is_token)

    @cached_property
    def digest(self) -> str:
        """A hash that changes with any row of the output."""
        state = hashlib.sha256(repr((self.zero, self.tokens_digest, str(self.base))).encode())
        for path in self.order:
            state.update(self.sources[path].tobytes())
        return state.hexdigest()

    def holders(self, row: int) -> Sequence[Path]:
        """Return the models whose rows replace a row that a model lacks."""
        if self.base is not None and self.sources[self.base][row] >= 0:
            return (self.base,)
        return [path for path in self.order if self.sources[path][row] >= 0]


class RowsByToken(ModelReader):
    """A model with the rows of its token tensors in the output's order; other tensors are unchanged.

    `read_into` fills token tensors of any floating-point dtype; means of rows are exact in float64.
    """

    def __init__(self, model: ModelReader, rows: TokenRows, models: Mapping[Path, ModelReader], path: Path) -> None:
        self.path, self.keeps_head = model.path, model.keeps_head
        self._model, self._rows, self._models, self._key = model, rows, models, path
        mapping = rows.sources[path]
        self._averages = not rows.zero and bool((mapping < 0).any())
        self._means: dict[str, torch.Tensor] = {}
        self._averaging = Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._model.names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype, and its shape with the output's rows."""
        spec = self._model.spec(name)
        return TensorSpec(spec.dtype, (self._rows.rows, *spec.shape[1:])) if is_token_tensor(name) else spec

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that holds a tensor without rounding: float64 if some of its rows are means."""
        averaged = self._averages and is_token_tensor(name) and self._model.spec(name).dtype.is_floating_point
        return torch.float64 if averaged else self._model.exact_dtype(name)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`, reading consecutive rows together."""
        if not is_token_tensor(name) or not out.numel():
            self._model.read_into(name, start, out)
            return
        width = math.prod(self._model.spec(name).shape[1:])
        stop = start + out.numel()
        for first, last, source in _runs(self._rows.sources[self._key], start // width, (stop - 1) // width + 1):
            begin, end = max(start, first * width), min(stop, last * width)
            piece = out[begin - start : end - start]
            if source >= 0:
                _read(self._model, name, source * width + begin - first * width, piece)
            else:
                self._fill(name, first, begin - first * width, piece)

    def close(self) -> None:
        """Close the model."""
        self._model.close()

    def _fill(self, name: str, row: int, column: int, out: torch.Tensor) -> None:
        """Fill a part of a row that this model lacks, from `column`."""
        holders = () if self._rows.zero else self._rows.holders(row)
        width = math.prod(self._model.spec(name).shape[1:])
        total = torch.zeros(out.numel(), dtype=torch.float64)
        for path in holders:
            part = torch.empty(out.numel(), dtype=torch.float64)
            _read(self._models[path], name, int(self._rows.sources[path][row]) * width + column, part)
            total += part
        out.copy_(total / max(1, len(holders)))
        if not holders and not self._rows.zero and self._rows.is_token[row]:
            out.copy_(self._mean(name)[column : column + out.numel()])

    def _mean(self, name: str) -> torch.Tensor:
        """Return the mean of the model's own rows of tokens, flat, summed in float64 in a fixed order."""
        with self._averaging:
            if name not in self._means:
                spec = self._model.spec(name)
                width = math.prod(spec.shape[1:])
                own = np.unique(self._rows.sources[self._key][self._rows.is_token])
                has_token = np.zeros(spec.shape[0], dtype=bool)
                has_token[own[own >= 0]] = True
                total = torch.zeros(width, dtype=torch.float64)
                for first in range(0, len(has_token), _BLOCK_ROWS):
                    mask = torch.from_numpy(has_token[first : first + _BLOCK_ROWS])
                    block = torch.empty(len(mask) * width, dtype=torch.float64)
                    _read(self._model, name, first * width, block)
                    total += block.reshape(len(mask), width)[mask].sum(dim=0)
                self._means[name] = total / max(1, int(has_token.sum()))
            return self._means[name]


def _read(model: ModelReader, name: str, start: int, out: torch.Tensor) -> None:
    if out.dtype in (model.spec(name).dtype, exact := model.exact_dtype(name)):
        model.read_into(name, start, out)
    else:
        values = torch.empty(out.numel(), dtype=exact)
        model.read_into(name, start, values)
        out.copy_(values)


def _runs(mapping: np.ndarray, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row, end, source row) of rows whose sources are consecutive; a row without a source is yielded alone."""
    part = mapping[first:stop]
    breaks = np.flatnonzero((np.diff(part) != 1) | (part[1:] < 1)) + 1
    edges = [0, *breaks.tolist(), len(part)]
    for begin, end in itertools.pairwise(edges):
        yield first + begin, first + end, int(part[begin])
