"""The index of a Megatron-core token file, checked before Megatron-core reads it: it trusts what it finds there."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, dtype, sequences, documents
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}  # by the code of the dtype
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


def sequences_in(prefix: Path) -> np.ndarray[Any, Any]:
    """Return the length in tokens of each sequence of an index that is intact, int64 [sequences]."""
    with prefix.with_suffix(".idx").open("rb") as file:
        _, _, sequences, _ = _HEADER.unpack(file.read(len(_MAGIC) + _HEADER.size)[len(_MAGIC) :])
        return np.frombuffer(file.read(sequences * _LENGTH), np.int32).astype(np.int64)
