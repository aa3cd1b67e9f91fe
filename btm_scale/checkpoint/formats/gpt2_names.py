"""GPT-2's own files name their tensors as those of the bare transformer, without the prefix that its head adds."""

from __future__ import annotations

import torch

from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec

_PREFIX = "transformer."


def with_head_names(model: ModelReader) -> ModelReader:
    """A model under the names that transformers' language model has for its tensors; closing it closes the model."""
    return _Prefixed(model) if "wte.weight" in model.names else model


class _Prefixed(ModelReader):
    def __init__(self, model: ModelReader) -> None:
        self.path = model.path
        self._model = model
        self._own = {name if name.startswith("lm_head.") else f"{_PREFIX}{name}": name for name in model.names}
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
