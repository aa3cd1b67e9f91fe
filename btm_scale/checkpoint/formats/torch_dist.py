"""Read Megatron-core's distributed checkpoints (`torch_dist`) without Megatron-core.

Tensors are global: layers are stacked in the first dimension, and tensor parallel shards are chunks. A checkpoint
therefore depends on a tensor parallel degree only by the padding of its vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.fields import Fields, natural, one_dtype
from btm_scale.checkpoint.formats.inert import Inert
from btm_scale.checkpoint.formats.locate import iteration_folder
from btm_scale.checkpoint.formats.megatron import MegatronModel, find_shape
from btm_scale.checkpoint.formats.pickles import load_embedded, load_pickle, load_plain_pickle
from btm_scale.checkpoint.formats.stored import StoredTensor
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, is_shape, unknown_tensor
from btm_scale.errors import CheckpointError
from btm_scale.util.inside import file_inside

LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")
# Norms are saved under the names of the fused modules that some Megatron-core builds use.
NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_ITERATION = re.compile(r"iter_(\d+)")


@dataclass(frozen=True)
class _Chunk:
    """A block of a global tensor, at `offsets`."""

    offsets: tuple[int, ...]
    stored: StoredTensor


class _GlobalTensors(ModelReader):
    """The full tensors of a checkpoint, one per layer, under Megatron-core names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: dict[str, tuple[TensorSpec, list[_Chunk]]] = {}
        sizes, chunks = _listed(path)
        for name, parts in chunks.items():
            dtype = one_dtype([chunk.stored for chunk in parts], path, name)
            for flat_name, spec, own in _layers(name, TensorSpec(dtype, sizes[name]), parts):
                if not _tile(spec.shape, own):
                    raise CheckpointError(
                        f"{path}: the chunks of '{flat_name:.100}' overlap or are incomplete. Save it again."
                    )
                self._tensors[flat_name] = spec, own

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._tensors:
            raise unknown_tensor(self.path, name)
        return self._tensors[name][0]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`; a tensor sharded within rows is read in full."""
        spec, chunks = self._tensors[name]
        if all(chunk.stored.stride is None and chunk.stored.spec.shape[1:] == spec.shape[1:] for chunk in chunks):
            segments = tuple(segment for chunk in chunks for segment in chunk.stored.segments)
            StoredTensor(spec, segments).read_into(start, out)
            return
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        if tensor.dim() == 0:
            tensor = chunks[0].stored.read()
        for chunk in chunks if tensor.dim() else ():
            spans = zip(chunk.offsets, chunk.stored.spec.shape, strict=True)
            tensor[tuple(slice(offset, offset + size) for offset, size in spans)] = chunk.stored.read()
        out.copy_(tensor.reshape(-1)[start : start + out.numel()])


def open_torch_dist(path: Path) -> ModelReader:
    """Open a `torch_dist` checkpoint under Hugging Face names. Raises `CheckpointError` without a config.json."""
    return MegatronModel(path, [_GlobalTensors(iteration_folder(path))], find_shape(path))


def saved_iteration(path: Path) -> int | None:
    """Return the training step in `common.pt` or in the folder's name, or None."""
    path = iteration_folder(path)
    common = path / "common.pt"
    content = load_pickle(common) if common.is_file() else None
    iteration = content.get("iteration") if isinstance(content, dict) else None
    if iteration is not None:
        return natural(iteration, common, "iteration", 1 << 62)
    match = _ITERATION.fullmatch(path.absolute().name)
    return int(match[1]) if match else None


def _listed(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_Chunk]]]:
    """Return the sizes and the chunks of the model's tensors by name. Raises `CheckpointError`."""
    file = path / ".metadata"
    metadata = _state(load_plain_pickle(file), file, "metadata")
    described, stored = metadata.part("state_dict_metadata"), metadata.part("storage_data")
    sizes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[_Chunk]] = {}
    for key, value in stored.values.items():
        index = _state(key, file, "storage_data")
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            index.refuse("fqn", name, "the name of a tensor")
        if offset is None or not _is_model(name):
            continue
        size = _state(described.get(name), file, f"state_dict_metadata.{name}.").get("size")
        if not is_shape(offset) or not is_shape(size) or len(offset) != len(size):
            index.refuse(name, (offset, size), "an offset and a size of the same dimensions")
        place = _state(value, file, f"storage_data.{name}.")
        relative = place.get("relative_path")
        if not isinstance(relative, str):
            place.refuse("relative_path", relative, "the name of a file")
        start, length = (
            natural(place.get(each), file, f"{place.path}{each}", 1 << 62) for each in ("offset", "length")
        )
        tensor = load_embedded(file_inside(path, relative), start, length)
        if not isinstance(tensor, StoredTensor) or len(tensor.spec.shape) != len(size):
            place.refuse("offset", tensor, "where a tensor of those dimensions is")
        sizes[name] = tuple(size)
        chunks.setdefault(name, []).append(_Chunk(tuple(offset), tensor))
    for name, parts in chunks.items():
        _require_described(_state(described.get(name), file, f"state_dict_metadata.{name}."), parts)
    return sizes, chunks


def _require_described(tensor: Fields, parts: list[_Chunk]) -> None:
    """Raise `CheckpointError` unless the chunks in a tensor's metadata are those that are stored."""
    listed = tensor.sequence("chunks")
    blocks = set()
    for chunk in listed if len(listed) == len(parts) else ():
        fields = _state(chunk, tensor.file, f"{tensor.path}chunks.")
        blocks.add(tuple(tuple(fields.sequence(each)) for each in ("offsets", "sizes")))
    if blocks != {(part.offsets, part.stored.spec.shape) for part in parts}:
        tensor.refuse("chunks", listed, "the offsets and sizes of the stored chunks")


def _state(value: object, file: Path, field: str) -> Fields:
    """Return the attributes of an object that was not loaded."""
    return Fields(value.state if isinstance(value, Inert) else value, file, field)


def _tile(shape: tuple[int, ...], chunks: list[_Chunk]) -> bool:
    """Whether chunks fill a tensor completely and without overlaps: they are the cells of one grid."""
    edges = [sorted({chunk.offsets[axis] for chunk in chunks}) for axis in range(len(shape))]
    if any(edge[0] != 0 for edge in edges) or len({chunk.offsets for chunk in chunks}) != len(chunks):
        return False
    ends = [dict(zip(edge, [*edge[1:], size], strict=True)) for edge, size in zip(edges, shape, strict=True)]
    fills = all(
        chunk.stored.spec.shape[axis] == end[chunk.offsets[axis]] - chunk.offsets[axis]
        for chunk in chunks
        for axis, end in enumerate(ends)
    )
    return fills and len(chunks) == math.prod(map(len, edges))


def _is_model(name: str) -> bool:
    return name.startswith(("embedding.", "decoder.", "output_layer."))


def _layers(name: str, full: TensorSpec, chunks: list[_Chunk]) -> Iterator[tuple[str, TensorSpec, list[_Chunk]]]:
    """Yield the layers of a stacked tensor, each with its chunks in row-major order; other tensors unchanged."""
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
    match = LAYER.fullmatch(name)
    if match is None or match[1] is not None or not full.shape:
        yield name, full, chunks
        return
    rest = match[2]
    for stacked, own in NORMS.items():
        rest = rest.replace(stacked, own)
    by_layer: dict[int, list[_Chunk]] = {}
    for chunk in chunks:
        stored = chunk.stored
        if stored.spec.shape[0] == 1:
            stride = None if stored.stride is None else stored.stride[1:]
            part = StoredTensor(TensorSpec(full.dtype, stored.spec.shape[1:]), stored.segments, stride)
            by_layer.setdefault(chunk.offsets[0], []).append(_Chunk(chunk.offsets[1:], part))
    if full.shape[0] != len(by_layer):
        raise CheckpointError(
            f"'{name:.100}' has {full.shape[0]} layers, but chunks of {len(by_layer)}. Save it again."
        )
    for layer in sorted(by_layer):
        yield f"decoder.layers.{layer}.{rest}", TensorSpec(full.dtype, full.shape[1:]), by_layer[layer]
