"""The tensors of a training checkpoint: one safetensors file that all ranks of a group write and verify together.

Rank i of n writes the i-th of n equal ranges of every tensor, and hashes it in the same pass over the bytes. The digest
of a rank's part is the SHA-256 of the digests of its ranges in the order of the file; the part of the first rank begins
with the file's header.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.safetensors_writer import SINGLE, ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec, as_bytes

_BLOCK = 8 << 20
# A folder that was just made may show up late on another host.
_LATE_SECONDS = 60.0


class PartWriter:
    """Writes one rank's part of every tensor. The first rank creates the file; the others open it after that."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], index: int, count: int) -> None:
        self._index, self._count = index, count
        self._digests: dict[str, bytes] = {}
        self._writer = _attached(folder, specs) if index else ShardedWriter(folder, specs, max_shard_bytes=float("inf"))

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Write this rank's range of a complete float32 tensor, and return its bytes."""
        start, stop = _range(tensor.numel(), self._index, self._count)
        piece = tensor.reshape(-1)[start:stop].cpu().contiguous()
        self._digests[name] = hashlib.sha256(as_bytes(piece)).digest()
        self._writer.write_range(name, start, piece)
        return piece.nbytes

    def finish(self) -> str:
        """Return the digest of this rank's part. Ranks other than the first also sync and close the file.

        What the first rank wrote is synced when the checkpoint is published.
        """
        digest = hashlib.sha256()
        if self._index == 0:
            digest.update(hashlib.sha256(self._writer.header).digest())
        for name in self._writer.specs:
            digest.update(self._digests[name])
        if self._index:
            self._writer.sync()
            self._writer.detach()
        return digest.hexdigest()

    def publish(self) -> None:
        """Give the file its name, on the first rank, once every rank has finished."""
        for name in self._writer.specs:
            self._writer.mark_written(name)
        self._writer.close()


def part_digest(folder: Path, index: int, count: int) -> str:
    """Return the digest of part `index` of `count`, read from the file.

    Raises OSError or ValueError for a file that has no such part.
    """
    path = folder / SINGLE
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("the header is damaged")
        header = file.read(length)
        digest = hashlib.sha256()
        if index == 0:
            digest.update(hashlib.sha256(length.to_bytes(8, "little") + header).digest())
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        spans = sorted(tuple(map(int, value["data_offsets"])) for value in tensors.values())
        if 8 + length + spans[-1][1] != path.stat().st_size:
            raise ValueError("its size is not that of its tensors")
        for begin, end in spans:
            start, stop = (torch.float32.itemsize * at for at in _range((end - begin) // 4, index, count))
            piece = hashlib.sha256()
            for block in _blocks(file.fileno(), 8 + length + begin + start, stop - start):
                piece.update(block)
            digest.update(piece.digest())
    return digest.hexdigest()


def file_digest(folder: Path) -> str:
    """Return the SHA-256 of the complete file, which checkpoints of earlier versions record."""
    digest = hashlib.sha256()
    with (folder / SINGLE).open("rb") as file:
        for block in _blocks(file.fileno(), 0, os.fstat(file.fileno()).st_size):
            digest.update(block)
    return digest.hexdigest()


def _range(elements: int, index: int, count: int) -> tuple[int, int]:
    return elements * index // count, elements * (index + 1) // count


def _blocks(descriptor: int, position: int, size: int) -> Iterator[bytes]:
    end = position + size
    while position < end:
        block = os.pread(descriptor, min(_BLOCK, end - position), position)
        if not block:
            raise ValueError("the file is too short")
        yield block
        position += len(block)


def _attached(folder: Path, specs: Mapping[str, TensorSpec]) -> ShardedWriter:
    deadline = time.monotonic() + _LATE_SECONDS
    while True:
        try:
            return ShardedWriter(folder, specs, max_shard_bytes=float("inf"), attach=True)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)
