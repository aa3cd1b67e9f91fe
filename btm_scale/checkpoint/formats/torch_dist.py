"""Read Megatron-core's distributed checkpoints (`torch_dist`) without Megatron-core.

Tensors are global: layers are stacked in the first dimension, and tensor parallel shards are chunks. A checkpoint
therefore depends on a tensor parallel degree only by the padding of its vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.locate import iteration_folder
from btm_scale.checkpoint.formats.megatron import MegatronModel, find_shape
from btm_scale.checkpoint.formats.pickles import load_embedded, load_pickle, load_plain_pickle
from btm_scale.checkpoint.formats.stored import StoredTensor
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
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
        metadata = load_plain_pickle(path / ".metadata")
        chunks: dict[str, list[_Chunk]] = {}
        for index, info in metadata.storage_data.items():
            if getattr(index, "offset", None) is not None and _is_model(index.fqn):
                stored = load_embedded(file_inside(path, str(info.relative_path)), info.offset, info.length)
                chunks.setdefault(index.fqn, []).append(_Chunk(tuple(index.offset), stored))
        self._tensors: dict[str, tuple[TensorSpec, list[_Chunk]]] = {}
        for name, parts in chunks.items():
            size = tuple(metadata.state_dict_metadata[name].size)
            for flat_name, spec, own in _layers(name, size, parts):
                if sum(chunk.stored.spec.elements for chunk in own) != spec.elements:
                    raise CheckpointError(f"{path}: '{flat_name}' is incomplete. Save the checkpoint again.")
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
        if all(chunk.stored.spec.shape[1:] == spec.shape[1:] for chunk in chunks):
            segments = tuple(segment for chunk in chunks for segment in chunk.stored.segments)
            StoredTensor(spec, segments).read_into(start, out)
            return
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        for chunk in chunks:
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
    if isinstance(iteration, int):
        return iteration
    match = _ITERATION.fullmatch(path.absolute().name)
    return int(match[1]) if match else None


def _is_model(name: str) -> bool:
    return name.startswith(("embedding.", "decoder.", "output_layer."))


def _layers(name: str, size: tuple[int, ...], chunks: list[_Chunk]) -> Iterator[tuple[str, TensorSpec, list[_Chunk]]]:
    """Yield the layers of a stacked tensor, each with its chunks in row-major order; other tensors unchanged."""
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
    dtype = chunks[0].stored.spec.dtype
    match = LAYER.fullmatch(name)
    if match is None or match[1] is not None:
        yield name, TensorSpec(dtype, size), chunks
        return
    rest = match[2]
    for stacked, own in NORMS.items():
        rest = rest.replace(stacked, own)
    for layer in range(size[0]):
        own_chunks = []
        for chunk in chunks:
            shape = chunk.stored.spec.shape
            if chunk.offsets[0] == layer and shape[0] == 1:
                spec = TensorSpec(dtype, shape[1:])
                own_chunks.append(_Chunk(chunk.offsets[1:], StoredTensor(spec, chunk.stored.segments)))
        yield f"decoder.layers.{layer}.{rest}", TensorSpec(dtype, size[1:]), own_chunks
