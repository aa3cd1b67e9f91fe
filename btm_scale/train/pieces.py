"""Which elements of a checkpoint each rank has: its part of a Megatron-core tensor, as runs of Hugging Face tensors.

Converting a tensor moves complete rows or transposes them, so a contiguous part of a flat Megatron-core tensor is a few
rectangles, and each of them is runs of equal length at equal distances.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btm_scale.model.families.family import Entry
from btm_scale.model.hf_names import cut, to_huggingface
from btm_scale.model.shape import ModelShape

_TILE = 1 << 17  # elements: 512 KiB
_LINE = 16  # elements: a line of the cache, which is read once if tiles begin at lines
_TEXT = re.compile(r"(\d+)\+(\d+)(?:\*(\d+)/(\d+))?")


@dataclass(frozen=True)
class Span:
    """Elements of a tensor in row-major order: `count` runs of `length`, with `stride` from one's start to the next."""

    start: int
    length: int
    count: int = 1
    stride: int = 0

    @classmethod
    def of_runs(cls, start: int, length: int, count: int, stride: int) -> Self:
        """Return the span of some runs; runs that touch become one."""
        return cls(start, length * count) if count == 1 or length == stride else cls(start, length, count, stride)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the span that `str` writes as `text`. Raises ValueError for other text."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text[:50]}' is not a span")
        span = cls(*(int(number) for number in match.groups() if number is not None))
        if not span.length or not span.count or (span.count > 1 and span.stride < span.length):
            raise ValueError(f"'{text[:50]}' is not a span of separate runs")
        return span

    def __str__(self) -> str:
        return f"{self.start}+{self.length}" + (f"*{self.count}/{self.stride}" if self.count > 1 else "")

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.length * self.count

    @property
    def starts(self) -> range:
        """The first element of each run."""
        return range(self.start, self.start + max(self.stride, 1) * self.count, max(self.stride, 1))


@dataclass(frozen=True)
class Piece:
    """A span of a Hugging Face tensor, and the elements of a rank's flat part that belong there."""

    name: str
    span: Span
    _begin: int  # in the part, of a rectangle [rows, columns]
    _size: tuple[int, int]
    _pitch: int  # from a row's start to the next one's
    _rows: NDArray[np.int64]  # in the order of the Hugging Face tensor
    _transposed: bool

    def tiles(self, part: Tensor) -> Iterator[Tensor]:
        """Yield the span's elements in order, in flat tensors, from the rank's part; a view of it if nothing moves.

        On a CPU a matrix is transposed by tiles, which stay in a core's cache until they are hashed and written.
        """
        box = part.as_strided(self._size, (self._pitch, 1), part.storage_offset() + self._begin)
        first, count = int(self._rows[0]), len(self._rows)
        if int(self._rows[-1]) - first == count - 1 and bool(np.all(np.diff(self._rows) == 1)):
            box = box[first : first + count]
        else:
            box = box[torch.from_numpy(self._rows).to(part.device)]
        if not self._transposed:
            yield box.reshape(-1)
            return
        rows, columns = box.shape
        width = max(_LINE, _TILE // rows // _LINE * _LINE) if part.device.type == "cpu" else columns
        for left in range(0, columns, width):
            # PyTorch transposes a contiguous matrix in blocks, three times as fast as some of its columns.
            yield box[:, left : left + width].contiguous().t().reshape(-1)


class Placement:
    """Where the elements of one tensor rank's shard of a Megatron-core tensor, of size `local`, are in a checkpoint."""

    def __init__(
        self, entry: Entry, local: tuple[int, ...], shape: ModelShape, tensor_rank: int = 0, tensor: int = 1
    ) -> None:
        rows, self._columns = local if len(local) == 2 else (*local, 1)
        by_column = tensor > 1 and entry.cut == 1
        self._all_columns = self._columns * tensor if by_column else self._columns
        self._first_column = self._columns * tensor_rank if by_column else 0
        all_rows = rows * tensor if tensor > 1 and entry.cut == 0 else rows
        # Two columns of consecutive numbers show where rows go, and whether they become columns.
        width = len(local)
        probe = torch.arange(all_rows * width).view((all_rows, 2) if width == 2 else (all_rows,))
        converted = to_huggingface(entry, probe, shape)
        self._names = list(converted)
        self._heights: list[int] = []
        self._transposed = False
        tensor_of, row_of = np.full(all_rows, -1), np.zeros(all_rows, np.int64)
        for index, numbers in enumerate(converted.values()):
            self._transposed = width == 2 and int(numbers[-1, 0]) % 2 == 1
            first = numbers if width == 1 else numbers[0] if self._transposed else numbers[:, 0]
            sources = first.numpy() // width
            tensor_of[sources], row_of[sources] = index, np.arange(len(sources))
            self._heights.append(len(sources))
        own = np.arange(rows) if by_column else cut(entry, torch.arange(all_rows), tensor)[tensor_rank].numpy()
        self._tensor_of, self._row_of = tensor_of[own], row_of[own]

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of the part [start, stop) of the flat shard, without the padding of the vocabulary."""
        for rectangle in _rectangles(start, stop, self._columns):
            yield from self._pieces(rectangle, start)

    def share(self, index: int, copies: int) -> Iterator[Piece]:
        """Yield the pieces of one of `copies` equal parts of the complete flat shard.

        If its columns become rows, a part is some columns: some rows would be thousands of short runs.
        """
        rows = len(self._row_of)
        if self._transposed:
            left, right = (self._columns * i // copies for i in (index, index + 1))
            if left < right:
                yield from self._pieces((0, rows, left, right), 0)
            return
        start, stop = (rows * self._columns * i // copies for i in (index, index + 1))
        for rectangle in _rectangles(start, stop, self._columns):
            yield from self._pieces(rectangle, 0)

    def _pieces(self, rectangle: tuple[int, int, int, int], start: int) -> Iterator[Piece]:
        """Yield the pieces of a rectangle (top, bottom, left, right) in a part that begins at `start`."""
        top, bottom, left, right = rectangle
        tensors, targets = self._tensor_of[top:bottom], self._row_of[top:bottom]
        order = np.lexsort((targets, tensors))
        order = order[tensors[order] >= 0]
        jumps = (np.diff(tensors[order]) != 0) | (np.diff(targets[order]) != 1)
        for rows in np.split(order, np.flatnonzero(jumps) + 1) if len(order) else []:
            index, target = int(tensors[rows[0]]), int(targets[rows[0]])
            begin, width, column = top * self._columns + left - start, right - left, self._first_column + left
            if self._transposed:
                height = self._heights[index]
                span = Span.of_runs(column * height + target, len(rows), width, height)
            else:
                span = Span.of_runs(target * self._all_columns + column, width, len(rows), self._all_columns)
            size = (bottom - top, width)
            yield Piece(self._names[index], span, begin, size, self._columns, rows, self._transposed)


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the (top, bottom, left, right) of complete rows, and of the row's part before and after them."""
    while start < stop:
        row, left = divmod(start, columns)
        bottom = stop // columns if left == 0 else row + 1
        bottom = max(bottom, row + 1)
        right = min(columns, stop - row * columns)
        yield row, bottom, left, right
        start = (bottom - 1) * columns + right
