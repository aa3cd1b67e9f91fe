"""Checked access to what a foreign checkpoint contains; a message names the file and the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from btm_scale.checkpoint.formats.stored import StoredTensor
from btm_scale.checkpoint.formats.tensors import is_shape
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import shown


class Fields:
    """The values of one object in a file, by name. A value of a different type raises `CheckpointError`.

    `path` is the field that leads to the object, such as `optimizer_state_dict.`.
    """

    def __init__(self, values: object, file: Path, path: str = "") -> None:
        self.file, self.path = file, path
        if not isinstance(values, Mapping):
            field = f"'{path.rstrip('.')}'" if path else "its content"
            raise CheckpointError(f"{file}: {field} must be a mapping and is {shown(values)}. {_REMEDY}")
        self.values = values

    def get(self, name: str) -> Any:
        """Return a value, or None if it is absent."""
        return self.values.get(name)

    def part(self, name: str) -> Fields:
        """Return a mapping."""
        return Fields(self.get(name), self.file, f"{self.path}{name}.")

    def sequence(self, name: str) -> Sequence[Any]:
        """Return a list or tuple."""
        value = self.get(name)
        if not isinstance(value, (list, tuple)):
            self.refuse(name, value, "a list")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """Return a list of names, empty if it is absent."""
        values = () if self.get(name) is None else self.sequence(name)
        if not all(isinstance(value, str) for value in values):
            self.refuse(name, values, "a list of names")
        return tuple(values)

    def tensors(self, name: str) -> list[StoredTensor]:
        """Return a list of flat, contiguous tensors of one floating-point dtype."""
        values = self.sequence(name)
        for i, value in enumerate(values):
            flat = isinstance(value, StoredTensor) and value.stride is None and len(value.spec.shape) == 1
            if not flat or value.spec.dtype != values[0].spec.dtype or not value.spec.dtype.is_floating_point:
                self.refuse(f"{name}.{i}", value, "a flat tensor of the dtype of the others")
        return list(values)

    def refuse(self, name: str, value: object, rule: str) -> NoReturn:
        """Raise the error for a value of a different type."""
        raise CheckpointError(f"{self.file}: '{self.path}{name:.100}' must be {rule} and is {shown(value)}. {_REMEDY}")


def natural(value: object, file: Path, field: str, most: int = 1 << 31) -> int:
    """Return a natural number up to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise CheckpointError(
            f"{file}: '{field:.100}' must be a number from 0 to {most} and is {shown(value)}. {_REMEDY}"
        )
    return value


def named_shapes(values: object, file: Path, field: str) -> dict[str, tuple[int, ...]]:
    """Return shapes by the names of tensors."""
    fields = Fields(values, file, f"{field}.")
    for name, shape in fields.values.items():
        if not isinstance(name, str) or not is_shape(shape):
            fields.refuse(str(name) if isinstance(name, str) else shown(name), shape, "the shape of a tensor")
    return {name: tuple(shape) for name, shape in fields.values.items()}


def one_dtype(tensors: Sequence[StoredTensor], file: Path, field: str) -> torch.dtype:
    """Return the dtype of tensors that are joined. Raises `CheckpointError` if they differ or there are none."""
    dtypes = {tensor.spec.dtype for tensor in tensors}
    if len(dtypes) != 1:
        raise CheckpointError(f"{file}: '{field:.100}' has {len(dtypes)} dtypes, and must have one. {_REMEDY}")
    return dtypes.pop()


_REMEDY = "Copy the checkpoint again, or save it again."
