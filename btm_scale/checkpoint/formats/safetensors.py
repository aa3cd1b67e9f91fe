"""Read Hugging Face safetensors, single or sharded: validated when opened, read by ranges."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from btm_scale.checkpoint.formats.kept_hashes import kept_hashes
from btm_scale.checkpoint.formats.locate import read_json
from btm_scale.checkpoint.formats.safetensors_writer import INDEX, SINGLE
from btm_scale.checkpoint.formats.tensors import (
    DTYPES,
    ModelReader,
    TensorSpec,
    are_naturals,
    as_bytes,
    is_shape,
    unknown_tensor,
)
from btm_scale.checkpoint.formats.unreadable import require_weights_in
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import MAX_BYTES, parse_json, shown
from btm_scale.util.imports import torch
from btm_scale.util.inside import file_inside

_PACKED = ("F4", "F6_E2M3", "F6_E3M2")


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    spec: TensorSpec


def pread_into(descriptor: int, tensor: torch.Tensor, offset: int, path: Path) -> None:
    """Fill a contiguous tensor from a file. Raises `CheckpointError` if the file ends first."""
    pread_bytes(descriptor, as_bytes(tensor) if tensor.numel() else memoryview(b""), offset, path)


def pread_bytes(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    """Fill memory from a file. Raises `CheckpointError` if the file ends first."""
    while target:
        count = os.preadv(descriptor, [target], offset)
        if count == 0:
            raise CheckpointError(f"{path} ends at byte {offset}, inside a tensor. Copy the file again.")
        target, offset = target[count:], offset + count


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header of a safetensors file and the byte offset of its data. Raises `CheckpointError`."""
    try:
        require_weights_in(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_BYTES):
                raise CheckpointError(
                    f"{path} has {size} bytes, too few for its header. It is truncated or not a safetensors file: copy "
                    "it again."
                )
            header = parse_json(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Copy it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file: its header is {error}. Copy it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object. Copy it again.")
    return header, 8 + length


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, TensorSpec]:
    """Return a tensor's first byte, its end and its spec."""
    if isinstance(entry, dict):
        code, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if code in _PACKED:
            raise CheckpointError(
                f"{path}: '{name:.200}' is quantized to {code}, packed into bytes. Only fp8 weights "
                "with scales can be read. Use the unquantized model."
            )
        if isinstance(code, str) and code in DTYPES and is_shape(shape) and are_naturals(span) and len(span) == 2:
            return span[0], span[1], TensorSpec(code, tuple(shape))
    raise CheckpointError(
        f"{path} has an invalid header entry for '{name:.200}': {shown(entry, 200)}. Export it again."
    )


def _places(path: Path) -> dict[str, _Place]:
    """Return every tensor of one file, after checking that they fill its data without gaps or overlaps."""
    header, data = read_header(path)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # the library reads null too
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' in the header must map names to text. Export it again.")
    places, spans = {}, []
    for name, entry in header.items():
        begin, end, spec = _entry(path, name, entry)
        if end - begin != spec.nbytes:
            raise CheckpointError(
                f"{path}: '{name}' is {spec}, which takes {spec.nbytes} bytes, not {end - begin}. Export it again."
            )
        places[name] = _Place(path, data + begin, spec)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the previous tensor" if begin < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: '{name}' starts at data byte {begin} and {fault}. Export it again.")
        position = end
    size = path.stat().st_size - data
    if size != position:
        raise CheckpointError(f"{path} has {size} bytes of data, but its header says {position}. Copy it again.")
    return places


class SafetensorsModel(ModelReader):
    """A directory or file of safetensors, validated when opened; weights are read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._descriptors: dict[Path, int] = {}
        self._opening = Lock()  # reads are thread-safe
        if self.path.is_file():
            self._tensors = _places(self.path)
        elif (self.path / SINGLE).is_file():  # like transformers, which ignores an index beside it
            self._tensors = _places(file_inside(self.path, SINGLE))
        elif (index := self.path / INDEX).is_file():
            self._tensors = _indexed_places(index)
        else:
            raise CheckpointError(f"{self.path} has neither {SINGLE} nor {INDEX}. Give the path of a model directory.")
        self._names = tuple(sorted(self._tensors))
        self._kept: Mapping[str, Sequence[str]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._names

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return tuple(sorted({place.file for place in self._tensors.values()}))

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        return self._place(name).spec

    def kept_hashes(self, name: str) -> Sequence[str] | None:
        """Return the hashes of a tensor's blocks, if they are known of its bytes on disk."""
        if self._kept is None:
            self._kept = kept_hashes(self.path, self.files)
        return self._kept.get(name)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        place = self._place(name)
        if not 0 <= start <= start + out.numel() <= place.spec.elements or out.dtype != place.spec.dtype:
            raise IndexError(f"{out.numel()} {out.dtype} elements from {start} are outside of '{name}', {place.spec}")
        offset = place.offset + start * place.spec.itemsize
        pread_into(self._descriptor(place.file), out, offset, place.file)

    @property
    def needs_torch(self) -> bool:
        """Whether `read_bytes` imports torch: never."""
        return False

    def read_bytes_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of row-major elements from `start`."""
        place = self._place(name)
        elements, rest = divmod(len(out), place.spec.itemsize)
        if rest or not 0 <= start <= start + elements <= place.spec.elements:
            raise IndexError(f"{len(out)} bytes from element {start} are outside of '{name}', {place.spec}")
        pread_bytes(self._descriptor(place.file), out, place.offset + start * place.spec.itemsize, place.file)

    def close(self) -> None:
        """Close the shards."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _place(self, name: str) -> _Place:
        try:
            return self._tensors[name]
        except KeyError:
            raise unknown_tensor(self.path, name) from None

    def _descriptor(self, file: Path) -> int:
        with self._opening:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]


def weight_map(index: Path) -> dict[str, str]:
    """Return the shard of every tensor in an index. Raises `CheckpointError` if it is not a valid index."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} is not a shard index: it has no weight_map of file names. Download it again.")
    return listed


def _indexed_places(index: Path) -> dict[str, _Place]:
    """Return every tensor in an index, after checking that the index and the shards agree."""
    listed = weight_map(index)
    places: dict[str, _Place] = {}
    for shard in sorted(set(listed.values())):
        file = file_inside(index.parent, shard)
        if not file.is_file():
            raise CheckpointError(f"{index} lists the shard {shard}, which is missing. Copy it here.")
        in_shard = _places(file)
        expected = {name for name, where in listed.items() if where == shard}
        if odd := sorted(in_shard.keys() ^ expected):
            holder = "index" if odd[0] in expected else "shard"
            raise CheckpointError(
                f"{index} and {shard} disagree on {len(odd)} tensors: only the {holder} has '{odd[0]}'. Copy both "
                "again."
            )
        places |= in_shard
    return places
