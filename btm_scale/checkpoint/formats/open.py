"""Open a model of any supported checkpoint format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.deepspeed import checkpoint_folder, open_deepspeed
from btm_scale.checkpoint.formats.locate import iteration_folder, require_no_run, require_path
from btm_scale.checkpoint.formats.pytorch_bin import BIN, BIN_INDEX, open_bin
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import INDEX, SINGLE
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec
from btm_scale.checkpoint.formats.torch_dist import open_torch_dist
from btm_scale.checkpoint.formats.training import TrainingState, is_training_state
from btm_scale.checkpoint.formats.unreadable import require_megatron_metadata, require_supported_layout, unreadable
from btm_scale.errors import CheckpointError

_GPT2_PREFIX = "transformer."
_OPENERS: dict[str, Callable[[Path], ModelReader]] = {
    "safetensors": SafetensorsModel,
    "bin": open_bin,
    "deepspeed": open_deepspeed,
    "torch_dist": open_torch_dist,
    "training state": TrainingState,
}


def format_of(path: Path) -> str:
    """Return `safetensors`, `bin`, `deepspeed`, `torch_dist` or `training state`.

    Raises `CheckpointError` if `path` does not exist or is none of them.
    """
    require_path(path)
    if is_training_state(path):
        return "training state"
    if path.suffix == ".safetensors" or any((path / name).is_file() for name in (SINGLE, INDEX)):
        return "safetensors"
    if any((path / name).is_file() for name in (BIN, BIN_INDEX)):
        return "bin"
    if (iteration_folder(path) / ".metadata").is_file():
        require_megatron_metadata(iteration_folder(path))
        return "torch_dist"
    if path.is_dir() and (folder := checkpoint_folder(path)) is not None:
        require_supported_layout(folder)
        return "deepspeed"
    require_no_run(path)
    raise unreadable(path)


def open_model(path: Path) -> ModelReader:
    """Open a model under Hugging Face names.

    Raises `CheckpointError` for a path that does not exist, an unknown format or damaged files.
    """
    path = Path(path)
    model = _OPENERS[format_of(path)](path)
    if not model.names:
        model.close()
        raise CheckpointError(
            f"{path} has no named tensors. Save the model's state dict itself, not a dictionary around it."
        )
    return model


def with_head_names(model: ModelReader) -> ModelReader:
    """Return the model under the tensor names of transformers' causal LM class; closing it closes `model`.

    The published GPT-2 files use the names of the base model, without the prefix `transformer.`.
    """
    return _Prefixed(model) if "wte.weight" in model.names else model


class _Prefixed(ModelReader):
    def __init__(self, model: ModelReader) -> None:
        self.path = model.path
        self._model = model
        self._own = {name if name.startswith("lm_head.") else f"{_GPT2_PREFIX}{name}": name for name in model.names}
        self._names = tuple(sorted(self._own))

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def spec(self, name: str) -> TensorSpec:
        return self._model.spec(self._own.get(name, name))

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        self._model.read_into(self._own.get(name, name), start, out)

    def close(self) -> None:
        self._model.close()
