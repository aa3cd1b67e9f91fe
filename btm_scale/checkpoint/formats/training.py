"""Read btm-scale's own training checkpoints, `step-<n>`, as models of their float32 master weights."""

from __future__ import annotations

from pathlib import Path

from btm_scale.checkpoint.formats.locate import STATE_MARKER, described_in, read_json
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import SINGLE
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_config import read_shape
from btm_scale.model.hf_names import table
from btm_scale.util.imports import torch

_MASTER = "master/"


def is_training_state(path: Path) -> bool:
    """Whether a folder is a training checkpoint rather than a Hugging Face directory."""
    return (path / STATE_MARKER).is_file() and (path / SINGLE).is_file()


def saved_step(path: Path) -> int | None:
    """Return the step after which a training checkpoint was saved, or None if it is not recorded."""
    step = read_json(path / STATE_MARKER).get("step")
    return step if type(step) is int else None


class TrainingState(ModelReader):
    """The master weights under their Hugging Face names, without Adam's moments.

    Config and tokenizer come from the run's model of that name, or from its seed. Raises `CheckpointError` if the
    config does not fit the weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = SafetensorsModel(path)
        stored = (name for name in self._state.names if name.startswith(_MASTER))
        self._names = tuple(name.removeprefix(_MASTER) for name in stored)
        file = described_in(path) / "config.json"
        if file.is_file():
            shape = read_shape(file.parent)
            first = table(shape)[0].huggingface[0]
            expected = {name for entry in table(shape) for name in entry.huggingface}
            if set(self._names) != expected or self.spec(first).shape != (shape.vocabulary, shape.hidden):
                raise CheckpointError(
                    f"{file} does not describe the model in {path}. Put the config.json of that model into {path}."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._names:
            raise unknown_tensor(self.path, name)
        return self._state.spec(_MASTER + name)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self._state.read_into(_MASTER + name, start, out)

    def close(self) -> None:
        """Close the file."""
        self._state.close()
