"""Read the `.bin` files that Hugging Face models used before safetensors."""

from __future__ import annotations

from pathlib import Path

from btm_scale.checkpoint.formats.pickles import Inert, load_pickle
from btm_scale.checkpoint.formats.safetensors import weight_map
from btm_scale.checkpoint.formats.stored import StoredModel, StoredTensor
from btm_scale.checkpoint.formats.tensors import DTYPES
from btm_scale.checkpoint.formats.unreadable import require_weights_in
from btm_scale.checkpoint.formats.weight_sets import BIN, BIN_INDEX
from btm_scale.errors import CheckpointError
from btm_scale.util.inside import file_inside


def open_bin(directory: Path) -> StoredModel:
    """Open a `pytorch_model.bin` or its shards. Raises `CheckpointError` for missing, damaged or hostile files."""
    index = directory / BIN_INDEX
    single = (directory / BIN).is_file() or not index.is_file()  # like transformers, which ignores an index beside it
    names = [BIN] if single else sorted(set(weight_map(index).values()))
    shards = [file_inside(directory, name) for name in names]
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{index} lists the shard {shard.name}, which is missing. Copy it here.")
        content = _state_dict(shard)
        if twice := sorted(tensors.keys() & content.keys()):
            raise CheckpointError(f"{shard} has '{twice[0]:.100}', which another shard has too. Copy the model again.")
        tensors |= content
    return StoredModel(directory, tensors)


def open_state_dict(file: Path) -> StoredModel:
    """Open one file with a state dict. Raises like `open_bin`."""
    return StoredModel(file, _state_dict(file))


def _state_dict(file: Path) -> dict[str, StoredTensor]:
    require_weights_in(file)
    content = load_pickle(file)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} does not contain a state dict. Save `model.state_dict()`.")
    if unsupported := sorted(str(name) for name, value in content.items() if _is_unsupported(value)):
        raise CheckpointError(
            f"{file}: {len(unsupported)} tensors, the first '{unsupported[0]}', have a dtype or layout that is "
            "not supported in .bin files. Save the model as safetensors."
        )
    return {name: value for name, value in content.items() if isinstance(value, StoredTensor)}


def _is_unsupported(value: object) -> bool:
    """Whether a value is a tensor that cannot be read: sparse, quantized or of an unsupported dtype."""
    if isinstance(value, StoredTensor):
        return value.spec.code not in DTYPES
    return isinstance(value, Inert) and value.kind.startswith("torch._utils._rebuild_")
