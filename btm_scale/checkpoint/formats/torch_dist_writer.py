"""Write Megatron-core's distributed checkpoints (`torch_dist`) without Megatron-core."""

from __future__ import annotations

import io
import json
import pickle
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

from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.torch_dist import LAYER, NORMS
from btm_scale.model.hf_names import from_huggingface, table
from btm_scale.model.shape import ModelShape
from btm_scale.util.files import make_directory, require_space

_MAX_FILE_BYTES = 5e9
# Modules whose `_extra_state` Megatron-core loads; ours is empty.
_STATEFUL = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_torch_dist(
    directory: Path,
    model: ModelReader,
    shape: ModelShape,
    *,
    tensor: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face model for Megatron-core at any tensor parallel degree that divides `tensor`.

    One tensor is in memory at a time. The marker, `metadata.json`, is written last; publishing the directory fsyncs
    it. Raises `CheckpointError` if the disk has too little space.
    """
    directory = Path(directory)
    require_space(directory, model.nbytes_as(dtype))
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True)
    rows = -(-shape.vocabulary // tensor) * tensor
    files = _Files(directory)
    metadata = Metadata({}, storage_data={})
    for entry in table(shape):
        weight = from_huggingface(entry, model.read, shape, rows)
        weight = weight if dtype is None else weight.to(dtype)
        match = LAYER.fullmatch(entry.megatron)
        name, offsets, size = entry.megatron, [0] * weight.dim(), list(weight.shape)
        if match is not None:
            name, offsets, size = _stacked(match[2]), [int(match[1]), *offsets], [shape.layers, *size]
            weight = weight[None]
        chunk = ChunkStorageMetadata(torch.Size(offsets), weight.shape)
        stored = metadata.state_dict_metadata.setdefault(
            name, TensorStorageMetadata(TensorProperties(weight.dtype), torch.Size(size), [])
        )
        assert isinstance(stored, TensorStorageMetadata)
        stored.chunks.append(chunk)
        metadata.storage_data[MetadataIndex(name, offsets)] = files.add(weight.contiguous().clone())
    for layer in range(shape.layers):
        for module in _STATEFUL:
            name = f"decoder.layers.{module}._extra_state/shard_{layer}_{shape.layers}"
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(name)] = files.add([None])
    files.close()
    with (directory / "common.pt").open("wb") as common:
        torch.save({}, common)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))


def _stacked(rest: str) -> str:
    for stacked, own in NORMS.items():
        rest = rest.replace(own, stacked)
    return f"decoder.layers.{rest}"


class _Files:
    """The data files, filled one after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0
        self.file: IO[bytes] | None = None

    def add(self, content: Any) -> _StorageInfo:
        """Append one object and return its location."""
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
        """Close the current file."""
        if self.file is not None:
            self.file.close()
