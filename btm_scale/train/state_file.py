"""The tensors of a training checkpoint: one safetensors file that all ranks of a group write and verify together.

Each rank writes the spans of tensors whose elements it has, and hashes them while it does, so that the bytes are passed
over once. The digest of a rank's part is the SHA-256 of the bytes of its spans, each for every kind of tensor in the
order of the file; the part of the first rank begins with the file's header.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.safetensors_writer import SINGLE, ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec, are_naturals, as_bytes
from btm_scale.train.pieces import Span
from btm_scale.util.bounded_json import MAX_BYTES, parse_json
from btm_scale.util.files import partial_path
from btm_scale.util.records import Part

_BLOCK = 1 << 20  # fits into a core's cache, so that hashing and writing read memory once
_ITEM = torch.float32.itemsize
# A folder that was just made may show up late on another host.
_LATE_SECONDS = 60.0


class WrittenPart(Part):
    """What one rank wrote of a checkpoint."""

    sha256: str
    spans: dict[str, tuple[str, ...]]  # by the tensor's name without its kind

    @property
    def elements(self) -> dict[str, int]:
        """How many elements of each tensor the rank wrote. Raises ValueError for what is not a span."""
        return {name: sum(Span.parse(span).elements for span in spans) for name, spans in self.spans.items()}


class PartWriter:
    """Writes one rank's part of every tensor. The first rank creates the file; the others open it after that.

    Tensors are float32 and called `kind/name`; those that differ in their kind only have the same shape.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], *, creates: bool) -> None:
        self._specs = dict(specs)
        self._file = ShardedWriter(folder, specs, max_shard_bytes=float("inf")) if creates else None
        self._descriptor = _opened(partial_path(folder / SINGLE))
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        header = os.pread(self._descriptor, 8 + length, 0)
        self._begins, _, _ = _positions(header, json.loads(header[8:]))  # which this group wrote
        self._digest = hashlib.sha256(header if creates else b"")
        self._spans: dict[str, list[Span]] = {}

    def write(self, name: str, span: Span, pieces: Mapping[str, Iterable[torch.Tensor]]) -> int:
        """Write one span of `kind/name` for each kind, from its elements in flat float32 tensors; return the bytes."""
        for kind, tensors in pieces.items():
            begin, element = self._begins[f"{kind}/{name}"], 0
            for tensor in tensors:
                data = as_bytes(tensor.cpu().contiguous())
                while data:
                    run, inside = divmod(element, span.length)
                    size = min(len(data), (span.length - inside) * _ITEM)
                    self._write(data[:size], begin + (span.starts[run] + inside) * _ITEM)
                    data, element = data[size:], element + size // _ITEM
        self._spans.setdefault(name, []).append(span)
        return span.elements * _ITEM * len(pieces)

    def _write(self, data: memoryview, position: int) -> None:
        for at in range(0, len(data), _BLOCK):
            block = data[at : at + _BLOCK]
            self._digest.update(block)
            while block:
                count = os.pwrite(self._descriptor, block, position)
                block, position = block[count:], position + count

    def finish(self) -> WrittenPart:
        """Return what this rank wrote. Ranks other than the first also sync the file.

        What the first rank wrote is synced when the checkpoint is published.
        """
        if self._file is None:
            os.fdatasync(self._descriptor)
        os.close(self._descriptor)
        spans = {name: tuple(map(str, spans)) for name, spans in self._spans.items()}
        return WrittenPart(sha256=self._digest.hexdigest(), spans=spans)

    def publish(self, parts: Sequence[WrittenPart]) -> None:
        """Give the file its name, on the rank that created it, once every rank has finished.

        Raises RuntimeError, and removes the file, if the parts of all ranks are not complete.
        """
        assert self._file is not None
        written = _elements(parts)
        for name, spec in self._specs.items():
            if written[name.partition("/")[2]] == spec.elements:
                self._file.mark_written(name)
        self._file.close()


def require_complete(folder: Path, parts: Sequence[WrittenPart]) -> None:
    """Raise ValueError, OSError or KeyError unless parts together have as many elements as each tensor of the file.

    Then verifying them reads the file about once, whatever a damaged or hostile `state.json` says.
    """
    with (folder / SINGLE).open("rb") as file:
        _, begins, kinds, ends = _read_header(file.fileno())
    written = _elements(parts)
    for name, begin in begins.items():
        kind, _, shared = name.partition("/")
        if kind not in kinds or written[shared] * _ITEM != ends[name] - begin:
            raise ValueError(f"its parts have {written[shared]} elements of '{name[:100]}'")


def _elements(parts: Sequence[WrittenPart]) -> Counter[str]:
    written: Counter[str] = Counter()
    for part in parts:
        written.update(part.elements)
    return written


def part_digest(folder: Path, part: WrittenPart, *, is_first: bool) -> str:
    """Return the digest of a part, read from the file.

    Raises OSError, ValueError or KeyError for a file that has no such part.
    """
    with (folder / SINGLE).open("rb") as file:
        header, begins, kinds, ends = _read_header(file.fileno())
        digest = hashlib.sha256(header if is_first else b"")
        for name, spans in part.spans.items():
            # A frozen tensor has only its weights. A name that the file lacks raises KeyError below.
            own = [kind for kind in kinds if f"{kind}/{name}" in begins] or kinds
            for span, kind in itertools.product(map(Span.parse, spans), own):
                begin = begins[f"{kind}/{name}"]
                if begin + (span.starts[-1] + span.length) * _ITEM > ends[f"{kind}/{name}"]:
                    raise ValueError(f"'{name[:100]}' does not have the elements {span}")
                for start in span.starts:
                    for block in _blocks(file.fileno(), begin + start * _ITEM, span.length * _ITEM):
                        digest.update(block)
    return digest.hexdigest()


def equal_part_digest(folder: Path, index: int, count: int) -> str:
    """Return the digest of part `index` of `count` as schema 2 has it: of the digests of equal ranges of the tensors.

    Raises OSError or ValueError for a file that has no such part.
    """
    with (folder / SINGLE).open("rb") as file:
        header, begins, _, _ = _read_header(file.fileno())
        ends = [*sorted(begins.values()), os.fstat(file.fileno()).st_size]
        digest = hashlib.sha256(hashlib.sha256(header).digest() if index == 0 else b"")
        for begin, end in itertools.pairwise(ends):
            elements = (end - begin) // _ITEM
            start, stop = elements * index // count, elements * (index + 1) // count
            piece = hashlib.sha256()
            for block in _blocks(file.fileno(), begin + start * _ITEM, (stop - start) * _ITEM):
                piece.update(block)
            digest.update(piece.digest())
    return digest.hexdigest()


def file_digest(folder: Path) -> str:
    """Return the SHA-256 of the complete file, which checkpoints of schema 1 record."""
    digest = hashlib.sha256()
    with (folder / SINGLE).open("rb") as file:
        for block in _blocks(file.fileno(), 0, os.fstat(file.fileno()).st_size):
            digest.update(block)
    return digest.hexdigest()


def _read_header(descriptor: int) -> tuple[bytes, dict[str, int], list[str], dict[str, int]]:
    """Return the header of a file, with its length, and its positions.

    Raises ValueError if it is damaged, or the file's size differs from what it says.
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > min(size - 8, MAX_BYTES):
        raise ValueError("the header is damaged")
    header = os.pread(descriptor, 8 + length, 0)
    begins, kinds, ends = _positions(header, parse_json(header[8:]))
    if max(ends.values(), default=len(header)) != size:
        raise ValueError("its size is not that of its tensors")
    return header, begins, kinds, ends


def _positions(header: bytes, content: Any) -> tuple[dict[str, int], list[str], dict[str, int]]:
    """Return where each tensor begins, the kinds of tensors in the order of the file, and where each tensor ends.

    Raises ValueError for a header that is not that of a checkpoint.
    """
    if not isinstance(content, dict):
        raise ValueError("the header is damaged")
    begins, ends = {}, {}
    for name, value in content.items():
        if name == "__metadata__":
            continue
        offsets = value.get("data_offsets") if isinstance(value, dict) else None
        if not are_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"the header is damaged at '{name[:100]}'")
        begins[name], ends[name] = (len(header) + offset for offset in offsets)
    in_order = sorted(begins, key=begins.__getitem__)
    return begins, list(dict.fromkeys(name.partition("/")[0] for name in in_order)), ends


def _blocks(descriptor: int, position: int, size: int) -> Iterator[bytes]:
    end = position + size
    while position < end:
        block = os.pread(descriptor, min(_BLOCK, end - position), position)
        if not block:
            raise ValueError("the file is too short")
        yield block
        position += len(block)


def _opened(path: Path) -> int:
    deadline = time.monotonic() + _LATE_SECONDS
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)
