"""Token files: the indexed datasets of Megatron-core, GPT-NeoX and NeMo, PREFIX.bin and PREFIX.idx.

The index has a header of 34 bytes, the length of each sequence, the byte at which it begins, and the first sequence of
each document.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, documents + 1
_MAGIC = b"MMIDIDX\0\0"
_OLD_MAGIC = b"TNTIDX\0\0"
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_AT_ONCE = 1 << 20  # sequences


def write_index(path: Path, lengths: np.ndarray[Any, Any], dtype: type[np.generic]) -> None:
    """Write the index of a token file of `dtype` with documents of these lengths, int32 [documents].

    Megatron-core's writer would first make a Python list of all positions, 40 bytes per document.
    """
    count = len(lengths)
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    begins = np.zeros(count, np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=begins[1:])
    begins *= np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
        for part in (lengths, begins, np.arange(count + 1, dtype=np.int64)):
            file.write(part.data)


class IndexedTokens:
    """The documents of PREFIX.bin and PREFIX.idx. Raises DataError for files that are damaged or of another kind."""

    def __init__(self, tokens: Path) -> None:
        self.path = tokens
        self._index = tokens.with_suffix(".idx")
        size = self._index.stat().st_size
        with self._index.open("rb") as file:
            header = file.read(_HEADER.size)
        if header.startswith(_OLD_MAGIC):
            raise DataError(
                f"{self._index} has fairseq's old format. Token files need the index that Megatron-core writes: "
                "tokenize the text again with its preprocess_data.py, or give the text itself."
            )
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._damaged(self._index, "does not begin like the index of token files")
        _, version, code, sequences, borders = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise DataError(
                f"{self._index} has version {version} and element type {code}. Token files have version 1 and "
                f"integers (types {', '.join(map(str, _DTYPES))}): tokenize the text again."
            )
        needed = _HEADER.size + 12 * sequences + 8 * borders
        if size not in (needed, needed + sequences):  # with one byte per sequence for its mode
            raise self._damaged(self._index, f"has {size:,} bytes, and its {sequences:,} sequences need {needed:,}")
        self._dtype: np.dtype[Any] = np.dtype(_DTYPES[code])
        self._lengths = self._part(np.int32, _HEADER.size, sequences)
        self._begins = self._part(np.int64, _HEADER.size + 4 * sequences, sequences)
        self._borders = self._part(np.int64, _HEADER.size + 12 * sequences, borders)
        self._require_whole(sequences)

    @property
    def tokens(self) -> int:
        """The tokens of all documents."""
        return self.path.stat().st_size // self._dtype.itemsize

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the ids of each document, [tokens]; a document without tokens is empty."""
        content = np.memmap(self.path, self._dtype, "r") if self.tokens else np.zeros(0, self._dtype)
        ends = np.append(self._begins // self._dtype.itemsize, self.tokens)
        for first in range(0, len(self._borders) - 1, _AT_ONCE):
            places = ends[self._borders[first : first + _AT_ONCE + 1]]
            for begin, end in zip(places[:-1].tolist(), places[1:].tolist(), strict=True):
                yield np.array(content[begin:end])

    def _part(self, dtype: type[np.generic], offset: int, count: int) -> np.ndarray[Any, Any]:
        return np.memmap(self._index, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)

    def _require_whole(self, sequences: int) -> None:
        """Check that sequences follow each other up to the end of the tokens, and documents up to the last sequence."""
        end = 0
        for first in range(0, sequences, _AT_ONCE):
            lengths = self._lengths[first : first + _AT_ONCE].astype(np.int64)
            ends = end + np.cumsum(lengths * self._dtype.itemsize)
            begins = np.concatenate([[end], ends[:-1]])
            if lengths.min() < 0 or not np.array_equal(self._begins[first : first + _AT_ONCE], begins):
                raise self._damaged(self._index, f"has sequences that do not follow each other after number {first:,}")
            end = int(ends[-1])
        size = self.path.stat().st_size
        if size != end:
            raise self._damaged(self.path, f"has {size:,} bytes, and its index describes {end:,}")
        borders = self._borders
        if not len(borders) or borders[0] != 0 or borders[-1] != sequences or (borders[1:] < borders[:-1]).any():
            raise self._damaged(self._index, "has documents that do not follow each other")

    def _damaged(self, path: Path, problem: str) -> DataError:
        return DataError(f"{path} {problem}. It is damaged: copy {path.stem}.bin and .idx again.")
