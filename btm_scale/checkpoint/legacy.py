"""The `.bin` files that Hugging Face models had before safetensors."""

from __future__ import annotations

from pathlib import Path

from btm_scale.checkpoint.pickles import load_pickle
from btm_scale.checkpoint.safetensors import weight_map
from btm_scale.checkpoint.stored import StoredModel, StoredTensor
from btm_scale.errors import CheckpointError

BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


def open_bin(directory: Path) -> StoredModel:
    """A `pytorch_model.bin`, or its shards; raises `CheckpointError` for missing, torn or hostile files."""
    index = directory / BIN_INDEX
    shards = [directory / BIN]
    if index.is_file():
        shards = [directory / name for name in sorted(set(weight_map(index).values()))]
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{index} names the shard {shard.name}, which is missing. Copy it here.")
        content = load_pickle(shard)
        if not isinstance(content, dict):
            raise CheckpointError(f"{shard} holds no state dict.")
        tensors |= {name: value for name, value in content.items() if isinstance(value, StoredTensor)}
    return StoredModel(directory, tensors)
