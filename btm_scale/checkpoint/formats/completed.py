"""Weights without the frozen parameters, completed by the base model that they were trained from."""

from __future__ import annotations

from pathlib import Path

from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError, few_names
from btm_scale.model.families import FAMILIES
from btm_scale.model.hf_config import shape_from_config
from btm_scale.model.hf_names import table
from btm_scale.util.imports import torch

_HEAD = "lm_head.weight"


class CompletedModel(ModelReader):
    """The tensors of a checkpoint, and those of its base that it lacks. Closing it closes both.

    Raises `CheckpointError` if the checkpoint has a tensor that the base lacks, or in another shape.
    """

    def __init__(self, path: Path, model: ModelReader, base: ModelReader) -> None:
        self.path = path  # with its base, which the model's own path lacks
        self._model, self._base = model, base
        self._trained = set(model.names)
        odd = [
            name
            for name in model.names
            if name != _HEAD and (name not in base.names or base.spec(name).shape != model.spec(name).shape)
        ]
        if odd:
            raise CheckpointError(
                f"{model.path} has {few_names(odd, 'tensors')}, which {base.path} lacks or has in another shape. Give "
                "the model from which the checkpoint was trained (--base DIR; `base` in Python)."
            )
        self._names = tuple(sorted({*model.names, *base.names}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._names:
            raise unknown_tensor(self.path, name)
        return (self._model if name in self._trained else self._base).spec(name)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self.spec(name)
        (self._model if name in self._trained else self._base).read_into(name, start, out)

    def close(self) -> None:
        """Close the checkpoint and its base."""
        self._model.close()
        self._base.close()


def require_frozen(model: ModelReader, path: Path) -> None:
    """Raise `CheckpointError` if a checkpoint has only some of the tensors that its config.json describes.

    Models of other families, and those with tensors that the config does not describe, are not checked.
    """
    config = described_config(path)
    if config.get("model_type") not in FAMILIES:
        return
    try:
        shape = shape_from_config(config, path / "config.json")
    except CheckpointError:  # a variant of the family
        return
    expected = {name for entry in table(shape) for name in entry.huggingface}
    lacking = expected - set(model.names)
    if lacking and set(model.names) <= expected | {_HEAD}:
        raise CheckpointError(
            f"{path} lacks {few_names(lacking, 'tensors')}. It was saved without its frozen parameters, or is "
            "incomplete: give the model that it was trained from (--base DIR; `base` in Python), or copy the missing "
            "files here."
        )
