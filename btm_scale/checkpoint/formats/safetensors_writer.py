"""Write safetensors in a stream: every tensor's offset is fixed before the first byte is written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from btm_scale.checkpoint.formats.tensors import TensorSpec, as_bytes
from btm_scale.util.direct_io import BLOCK, open_direct, write_at, write_directly
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_directory, partial_path, require_space
from btm_scale.util.imports import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PIECE_BYTES = 8 << 20


class ShardedWriter:
    """Writes safetensors shards, taking tensors in any order and in pieces.

    Shards have temporary names until `close`, which checks that they are complete, renames them and writes the index
    last; publishing the directory fsyncs them. An exception in a `with` block, or `abort`, removes them.
    `attach=True` opens shards that another process or an earlier attempt created with the same arguments, so that
    several processes can write; the process that created them calls `close`. With `direct` bytes go to the disk without
    taking memory of the page cache, where the file system and the place of the bytes in memory allow it: see `skew`.
    """

    def __init__(
        self,
        directory: Path,
        specs: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: float = 5e9,
        metadata: Mapping[str, str] | None = None,
        attach: bool = False,
        direct: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.specs = dict(specs)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in specs}
        self._marking = Lock()  # writes are thread-safe
        self._where: dict[str, tuple[int, int]] = {}
        self._shards: list[tuple[str, int]] = []
        self._direct: dict[int, int] = {}  # descriptors by the number of the shard
        groups = _shard_groups(self.specs, max_shard_bytes)
        headers = [_header({name: self.specs[name] for name in group}, metadata) for group in groups]
        self._headers = headers
        total = sum(spec.nbytes for spec in self.specs.values()) + sum(map(len, headers))
        if not attach:
            require_space(self.directory, total)
            make_directory(self.directory.parent)
            self.directory.mkdir(exist_ok=True)
        for i, (group, header) in enumerate(zip(groups, headers, strict=True)):
            name = SINGLE if len(groups) == 1 else f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
            position = len(header)
            for tensor in group:
                self._where[tensor] = (i, position)
                position += self.specs[tensor].nbytes
            flags = os.O_RDWR | os.O_NOFOLLOW | (0 if attach else os.O_CREAT | os.O_TRUNC)
            descriptor = os.open(partial_path(self.directory / name), flags, 0o666)
            self._shards.append((name, descriptor))
            if direct and (opened := open_direct(partial_path(self.directory / name))) is not None:
                self._direct[i] = opened
                # Pages that a resumed merge has read may span several blocks, of which some are written directly.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not attach:
                with writing(self.directory / name):
                    os.ftruncate(descriptor, position)
                    if i in self._direct:
                        os.posix_fallocate(descriptor, 0, position)  # direct writes into holes wait for each other
                    write_at(descriptor, memoryview(header), 0)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a complete tensor. Raises `ValueError` if its dtype or shape differs from its spec."""
        if (actual := TensorSpec.of(tensor)) != self.specs[name]:
            raise ValueError(f"'{name}' is {actual}, but its spec says {self.specs[name]}")
        self.write_range(name, 0, tensor)

    def write_range(self, name: str, start: int, tensor: torch.Tensor) -> None:
        """Write row-major elements from `start`. Raises `ValueError` if they do not fit the spec."""
        spec, stop = self.specs[name], start + tensor.numel()
        if tensor.dtype != spec.dtype or not 0 <= start <= stop <= spec.elements:
            raise ValueError(f"{tensor.dtype} elements [{start}, {stop}) are outside of '{name}', {spec}")
        self.write_bytes(name, start, as_bytes(tensor.cpu().contiguous()) if stop > start else memoryview(b""))

    def write_bytes(self, name: str, start: int, data: memoryview) -> None:
        """Write the bytes of row-major elements from `start`. Raises `ValueError` if they do not fit the spec."""
        spec = self.specs[name]
        stop, rest = start + len(data) // spec.itemsize, len(data) % spec.itemsize
        if rest or not 0 <= start <= stop <= spec.elements:
            raise ValueError(f"{len(data)} bytes from element {start} are outside of '{name}', {spec}")
        shard, offset = self._where[name]
        if stop > start:
            with writing(self.directory / self._shards[shard][0]):
                self._put(shard, data, offset + start * spec.itemsize)
        self.mark_written(name, start, stop)

    def skew(self, name: str, start: int) -> int:
        """Return how many bytes after the border of a block an element is in its file; 0 if it is not written directly.

        If its bytes are as far from such a border in memory, the complete blocks from there are written directly.
        """
        shard, offset = self._where[name]
        return (offset + start * self.specs[name].itemsize) % BLOCK if shard in self._direct else 0

    @property
    def is_direct(self) -> bool:
        """Whether shards are written directly."""
        return bool(self._direct)

    def _put(self, shard: int, data: memoryview, offset: int) -> None:
        buffered = self._shards[shard][1]
        if shard in self._direct:
            write_directly(self._direct[shard], buffered, data, offset)
        else:
            write_at(buffered, data, offset)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of elements [start, stop) as they are in the file, in pieces; fewer if the file is short."""
        shard, offset = self._where[name]
        size = self.specs[name].itemsize
        position, end = offset + start * size, offset + stop * size
        while position < end and (
            data := os.pread(self._shards[shard][1], min(_PIECE_BYTES, end - position), position)
        ):
            yield memoryview(data)
            position += len(data)

    @property
    def header(self) -> bytes:
        """The bytes of the first shard before its tensors."""
        return self._headers[0]

    def has_its_headers(self) -> bool:
        """Whether every shard begins with the header that its tensors have."""
        shards = zip(self._shards, self._headers, strict=True)
        return all(os.pread(descriptor, len(header), 0) == header for (_, descriptor), header in shards)

    def mark_written(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Mark a range as written, by an attached writer or before an interruption."""
        stop = self.specs[name].elements if stop is None else stop
        with self._marking:
            spans = sorted([*self._written[name], (start, stop)])
            joined = spans[:1]
            for begin, end in spans[1:]:
                if begin <= joined[-1][1]:
                    joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
                else:
                    joined.append((begin, end))
            self._written[name] = joined

    def shard_of(self, name: str) -> int:
        """Return the index, from 0, of a tensor's shard."""
        return self._where[name][0]

    def sync(self) -> None:
        """Flush everything written so far to disk."""
        for _, descriptor in self._shards:
            os.fdatasync(descriptor)

    def detach(self) -> None:
        """Close the files without publishing them."""
        while self._shards:
            os.close(self._shards.pop()[1])
        while self._direct:
            os.close(self._direct.popitem()[1])

    def close(self) -> None:
        """Publish the shards. Raises `RuntimeError`, and removes them, if any tensor is incomplete."""
        missing = [name for name, spec in self.specs.items() if self._written[name] != [(0, spec.elements)]]
        if missing:
            self.abort()
            raise RuntimeError(f"{len(missing)} tensors are incomplete, the first is '{missing[0]}'")
        names = [name for name, _ in self._shards]
        self.detach()
        for name in names:
            partial_path(self.directory / name).rename(self.directory / name)
        if len(names) > 1:
            weight_map = {tensor: names[shard] for tensor, (shard, _) in sorted(self._where.items())}
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def abort(self) -> None:
        """Remove the unpublished shards."""
        names = [name for name, _ in self._shards]
        self.detach()
        for name in names:
            partial_path(self.directory / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _shard_groups(specs: Mapping[str, TensorSpec], max_shard_bytes: float) -> list[list[str]]:
    """Return tensor names by shard, in the given order; within a shard wide dtypes come first, for alignment."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += spec.nbytes
    return [sorted(group, key=lambda name: -specs[name].itemsize) for group in groups]


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """Return a file's header: its length, then JSON padded so that the data starts at the border of a block."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, spec in specs.items():
        span = [position, position + spec.nbytes]
        header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": span}
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % BLOCK)
    return len(text).to_bytes(8, "little") + text
