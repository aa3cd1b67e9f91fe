"""Megatron-core's distributed checkpoints (`torch_dist`), read and written without Megatron-core.

A tensor is global: layers are stacked in a first dimension, tensor parallel parts are chunks of it, so that a
checkpoint has no tensor degree but that its vocabulary is padded for one.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from btm_scale.checkpoint.megatron import MegatronModel, find_shape
from btm_scale.checkpoint.pickles import load_embedded, load_plain_pickle
from btm_scale.checkpoint.publish import require_space, write_file
from btm_scale.checkpoint.stored import StoredTensor
from btm_scale.checkpoint.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError
from btm_scale.model.names import from_huggingface, table
from btm_scale.model.shape import ModelShape

_MAX_FILE_BYTES = 5e9
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")
# Norms are kept under the names of the fused modules that some builds of Megatron-core have.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# Modules for which Megatron-core looks for a state beside their weights, here an empty one.
_STATEFUL = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor, at `offsets`."""

    offsets: tuple[int, ...]
    stored: StoredTensor


class _GlobalTensors(ModelReader):
    """A checkpoint's tensors, layer by layer, whole and under Megatron-core's names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = load_plain_pickle(path / ".metadata")
        chunks: dict[str, list[_Chunk]] = {}
        for index, info in metadata.storage_data.items():
            if getattr(index, "offset", None) is not None and _is_model(index.fqn):
                stored = load_embedded(path / info.relative_path, info.offset, info.length)
                chunks.setdefault(index.fqn, []).append(_Chunk(tuple(index.offset), stored))
        self._tensors: dict[str, tuple[TensorSpec, list[_Chunk]]] = {}
        for name, parts in chunks.items():
            size = tuple(metadata.state_dict_metadata[name].size)
            for flat_name, spec, own in _layers(name, size, parts):
                if sum(chunk.stored.spec.elements for chunk in own) != spec.elements:
                    raise CheckpointError(f"{path}: '{flat_name}' is not whole. Save it again.")
                self._tensors[flat_name] = spec, own

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._tensors))

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        if name not in self._tensors:
            raise unknown_tensor(self.path, name)
        return self._tensors[name][0]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with the row-major elements from `start`; a tensor cut across its rows is read whole."""
        spec, chunks = self._tensors[name]
        if all(chunk.stored.spec.shape[1:] == spec.shape[1:] for chunk in chunks):
            segments = tuple(segment for chunk in chunks for segment in chunk.stored.segments)
            StoredTensor(spec, segments).read_into(start, out)
            return
        whole = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in chunks:
            places = zip(chunk.offsets, chunk.stored.spec.shape, strict=True)
            whole[tuple(slice(offset, offset + size) for offset, size in places)] = chunk.stored.read()
        out.copy_(whole.reshape(-1)[start : start + out.numel()])


def open_torch_dist(path: Path) -> ModelReader:
    """A `torch_dist` checkpoint under Hugging Face names; raises `CheckpointError` without a config.json."""
    return MegatronModel(path, [_GlobalTensors(path)], find_shape(path))


def _is_model(name: str) -> bool:
    return name.startswith(("embedding.", "decoder.", "output_layer."))


def _layers(
    name: str, size: tuple[int, ...], chunks: list[_Chunk]
) -> Iterator[tuple[str, TensorSpec, list[_Chunk]]]:
    """A stacked tensor's layers, each with its chunks in row-major order; others as they are."""
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
    dtype = chunks[0].stored.spec.dtype
    match = _LAYER.fullmatch(name)
    if match is None or match[1] is not None:
        yield name, TensorSpec(dtype, size), chunks
        return
    rest = match[2]
    for stacked, own in _NORMS.items():
        rest = rest.replace(stacked, own)
    for layer in range(size[0]):
        own_chunks = []
        for chunk in chunks:
            shape = chunk.stored.spec.shape
            if chunk.offsets[0] == layer and shape[0] == 1:
                spec = TensorSpec(dtype, shape[1:])
                own_chunks.append(_Chunk(chunk.offsets[1:], StoredTensor(spec, chunk.stored.segments)))
        yield f"decoder.layers.{layer}.{rest}", TensorSpec(dtype, size[1:]), own_chunks


def write_torch_dist(
    directory: Path,
    model: ModelReader,
    shape: ModelShape,
    *,
    tensor: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face model for Megatron-core at the tensor degrees that divide `tensor`.

    Holds one tensor at a time. The marker, `metadata.json`, is written last. Raises `CheckpointError` when
    the disk is too small.
    """
    directory = Path(directory)
    require_space(directory, sum(model.spec(name).nbytes for name in model.names))
    directory.mkdir(parents=True, exist_ok=True)
    rows = -(-shape.vocabulary // tensor) * tensor
    files = _Files(directory)
    metadata = Metadata({}, storage_data={})
    for entry in table(shape):
        whole = from_huggingface(entry, model.read, shape, rows)
        whole = whole if dtype is None else whole.to(dtype)
        match = _LAYER.fullmatch(entry.megatron)
        name, offsets, size = entry.megatron, [0] * whole.dim(), list(whole.shape)
        if match is not None:
            name, offsets, size = _stacked(match[2]), [int(match[1]), *offsets], [shape.layers, *size]
            whole = whole[None]
        chunk = ChunkStorageMetadata(torch.Size(offsets), whole.shape)
        known = metadata.state_dict_metadata.setdefault(
            name, TensorStorageMetadata(TensorProperties(whole.dtype), torch.Size(size), [])
        )
        assert isinstance(known, TensorStorageMetadata)
        known.chunks.append(chunk)
        metadata.storage_data[MetadataIndex(name, offsets)] = files.add(whole.contiguous().clone())
    for layer in range(shape.layers):
        for module in _STATEFUL:
            name = f"decoder.layers.{module}._extra_state/shard_{layer}_{shape.layers}"
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(name)] = files.add([None])
    files.close()
    torch.save({}, directory / "common.pt")
    write_file(directory / ".metadata", pickle.dumps(metadata))
    write_file(directory / "metadata.json", json.dumps(_FORMAT))


def _stacked(rest: str) -> str:
    for stacked, own in _NORMS.items():
        rest = rest.replace(own, stacked)
    return f"decoder.layers.{rest}"


class _Files:
    """The data files, filled one after the other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        self.file: IO[bytes] | None = None

    def add(self, content: Any) -> _StorageInfo:
        """Append one object; returns where it lies."""
        if self.file is None or self.file.tell() > _MAX_FILE_BYTES:
            self.close()
            self.name = f"__0_{self.count}.distcp"
            self.file = (self.directory / self.name).open("wb")
            self.count += 1
        start = self.file.tell()
        if isinstance(content, torch.Tensor):
            torch.save(content, self.file)
        else:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            self.file.write(buffer.getvalue())
        return _StorageInfo(self.name, start, self.file.tell() - start)

    def close(self) -> None:
        """Bring the file at hand to the disk."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
