"""Read Megatron-core's distributed checkpoints (`torch_dist`) without Megatron-core.

Tensors are global: layers are stacked in the first dimension, and tensor parallel shards are chunks. A checkpoint
therefore depends on a tensor parallel degree only by the padding of its vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from btm_scale.checkpoint.formats.dcp import Chunk, GlobalTensors
from btm_scale.checkpoint.formats.fields import natural
from btm_scale.checkpoint.formats.locate import iteration_folder
from btm_scale.checkpoint.formats.megatron import MegatronModel, find_shape
from btm_scale.checkpoint.formats.pickles import load_pickle
from btm_scale.checkpoint.formats.stored import StoredTensor
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec
from btm_scale.errors import CheckpointError

LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.*)")
# Norms are saved under the names of the fused modules that some Megatron-core builds use.
NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_ITERATION = re.compile(r"iter_(\d+)")
_KIND = "a torch_dist checkpoint of Megatron-core"


def open_torch_dist(path: Path) -> ModelReader:
    """Open a `torch_dist` checkpoint under Hugging Face names. Raises `CheckpointError` without a config.json."""
    return MegatronModel(path, [GlobalTensors(iteration_folder(path), _model_names, _layers)], find_shape(path, _KIND))


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


def _model_names(names: Iterable[str], path: Path) -> dict[str, str]:
    return {name: name for name in names if name.startswith(("embedding.", "decoder.", "output_layer."))}


def _layers(name: str, full: TensorSpec, chunks: list[Chunk]) -> Iterator[tuple[str, TensorSpec, list[Chunk]]]:
    """Yield the layers of a stacked tensor, each with its chunks in row-major order; other tensors unchanged."""
    chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
    match = LAYER.fullmatch(name)
    if match is None or match[1] is not None or not full.shape:
        yield name, full, chunks
        return
    rest = match[2]
    for stacked, own in NORMS.items():
        rest = rest.replace(stacked, own)
    by_layer: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        stored = chunk.stored
        if stored.spec.shape[0] == 1:
            stride = None if stored.stride is None else stored.stride[1:]
            part = StoredTensor(TensorSpec(full.dtype, stored.spec.shape[1:]), stored.segments, stride)
            by_layer.setdefault(chunk.offsets[0], []).append(Chunk(chunk.offsets[1:], part))
    if full.shape[0] != len(by_layer):
        raise CheckpointError(
            f"'{name:.100}' has {full.shape[0]} layers, but chunks of {len(by_layer)}. Save it again."
        )
    for layer in sorted(by_layer):
        yield f"decoder.layers.{layer}.{rest}", TensorSpec(full.dtype, full.shape[1:]), by_layer[layer]
