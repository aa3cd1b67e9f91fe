"""Megatron-core's distributed checkpoints (`torch_dist`), read without Megatron-core.

A tensor is global: layers are stacked in a first dimension, tensor parallel parts are chunks of it, so that a
checkpoint has no tensor degree but that its vocabulary is padded for one.
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

LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")
# Norms are kept under the names of the fused modules that some builds of Megatron-core have.
NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_ITERATION = re.compile(r"iter_(\d+)")


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
    return MegatronModel(path, [_GlobalTensors(iteration_folder(path))], find_shape(path))


def saved_iteration(path: Path) -> int | None:
    """The training step that Megatron wrote beside the weights, or into the name of their folder."""
    path = iteration_folder(path)
    common = path / "common.pt"
    content = load_pickle(common) if common.is_file() else None
    found = content.get("iteration") if isinstance(content, dict) else None
    if isinstance(found, int):
        return found
    named = _ITERATION.fullmatch(path.absolute().name)
    return int(named[1]) if named else None


def _is_model(name: str) -> bool:
    return name.startswith(("embedding.", "decoder.", "output_layer."))


def _layers(name: str, size: tuple[int, ...], chunks: list[_Chunk]) -> Iterator[tuple[str, TensorSpec, list[_Chunk]]]:
    """A stacked tensor's layers, each with its chunks in row-major order; others as they are."""
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
