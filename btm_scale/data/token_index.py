"""Token files of Megatron-core: the check of an index, which it trusts, and reading them without Megatron-core."""

from __future__ import annotations

import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, dtype, sequences, documents
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}  # by their codes
_ITEM_BYTES = {code: np.dtype(name).itemsize for code, name in _DTYPES.items()}
_LENGTH, _POINTER = 4, 8  # bytes per sequence length, and per pointer or document


def index_problem(prefix: Path) -> str | None:
    """Return what is wrong with `prefix`.idx, as the end of "it ...", or None if it fits `prefix`.bin."""
    path, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    try:
        with path.open("rb") as file:
            head = file.read(len(_MAGIC) + _HEADER.size)
            size = path.stat().st_size
            if head[: len(_MAGIC)] != _MAGIC or len(head) < len(_MAGIC) + _HEADER.size:
                return "is not an index"
            version, dtype, sequences, documents = _HEADER.unpack(head[len(_MAGIC) :])
            if version != 1 or dtype not in _ITEM_BYTES:
                return f"has version {version} and the dtype {dtype}"
            needed = len(head) + sequences * (_LENGTH + _POINTER) + documents * _POINTER
            if size != needed:
                return f"has {size} bytes, but its {sequences} sequences and {documents} documents need {needed}"
            if sequences == 0:
                return None
            file.seek(len(head) + (sequences - 1) * _LENGTH)
            (length,) = struct.unpack("<i", file.read(_LENGTH))
            file.seek(len(head) + sequences * _LENGTH + (sequences - 1) * _POINTER)
            (begin,) = struct.unpack("<q", file.read(_POINTER))
        if length < 0 or begin < 0 or begin + length * _ITEM_BYTES[dtype] > tokens.stat().st_size:
            return f"has a last sequence of {length} tokens at byte {begin}, which {tokens.name} does not have"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


class TokenSequences:
    """The sequences of `prefix`.bin, whose index is intact, read on demand."""

    def __init__(self, prefix: Path) -> None:
        with prefix.with_suffix(".idx").open("rb") as file:
            _, dtype, sequences, _ = _HEADER.unpack(file.read(len(_MAGIC) + _HEADER.size)[len(_MAGIC) :])
            self.lengths: np.ndarray[Any, Any] = np.frombuffer(file.read(sequences * _LENGTH), "<i4").astype(np.int64)
            """Tokens by sequence, int64 [sequences]."""
        self._prefix, self._dtype = prefix, np.dtype(_DTYPES[dtype])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray[Any, Any]:
        """Return the tokens of a sequence, [tokens] in the dtype of the file."""
        return np.frombuffer(self._bytes, self._dtype, int(self.lengths[number]), int(self._begins[number]))

    @cached_property
    def _begins(self) -> np.ndarray[Any, Any]:
        start = len(_MAGIC) + _HEADER.size + len(self) * _LENGTH
        return np.fromfile(self._prefix.with_suffix(".idx"), "<i8", len(self), offset=start)

    @cached_property
    def _bytes(self) -> np.ndarray[Any, Any]:
        return np.memmap(self._prefix.with_suffix(".bin"), np.uint8, "r")
