"""One door to every format of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from btm_scale.checkpoint.formats.deepspeed import checkpoint_folder, open_deepspeed
from btm_scale.checkpoint.formats.locate import iteration_folder
from btm_scale.checkpoint.formats.pytorch_bin import BIN, BIN_INDEX, open_bin
from btm_scale.checkpoint.formats.safetensors import INDEX, SINGLE, SafetensorsModel
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.formats.torch_dist import open_torch_dist
from btm_scale.checkpoint.formats.training import TrainingState, is_training_state
from btm_scale.errors import CheckpointError

_OPENERS: dict[str, Callable[[Path], ModelReader]] = {
    "safetensors": SafetensorsModel,
    "bin": open_bin,
    "deepspeed": open_deepspeed,
    "torch_dist": open_torch_dist,
    "training state": TrainingState,
}


def format_of(path: Path) -> str:
    """`safetensors`, `bin`, `deepspeed`, `torch_dist` or `training state`; raises `CheckpointError` for none."""
    if is_training_state(path):
        return "training state"
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in (SINGLE, INDEX)):
        return "safetensors"
    if any((path / name).is_file() for name in (BIN, BIN_INDEX)):
        return "bin"
    if (iteration_folder(path) / ".metadata").is_file():
        return "torch_dist"
    if path.is_dir() and checkpoint_folder(path) is not None:
        return "deepspeed"
    raise CheckpointError(f"{path} holds no model: neither {SINGLE}, {INDEX} nor {BIN}, and it is no other checkpoint.")


def open_model(path: Path) -> ModelReader:
    """A model of any known format, under Hugging Face names; raises `CheckpointError` for others."""
    path = Path(path)
    return _OPENERS[format_of(path)](path)
