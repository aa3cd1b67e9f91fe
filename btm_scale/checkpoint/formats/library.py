"""Read safetensors with the library, as transformers does: an independent reading for `--verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from btm_scale.checkpoint.formats.safetensors import weight_map
from btm_scale.checkpoint.formats.safetensors_writer import INDEX, SINGLE
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor
from btm_scale.errors import CheckpointError
from btm_scale.util.inside import file_inside


class LibraryModel(ModelReader):
    """All tensors of the files from which transformers loads a directory; one block of rows is in memory at a time."""

    def __init__(self, path: Path) -> None:
        """Open the files. Raises `CheckpointError` if the library cannot read one."""
        self.path = path
        names = [SINGLE] if (path / SINGLE).is_file() else sorted(set(weight_map(path / INDEX).values()))
        self._slices: dict[str, Any] = {}
        self._files = []
        try:
            for name in names:
                file = safe_open(file_inside(path, name), "pt")
                self._files.append(file)
                self._slices |= {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The safetensors library cannot read {path}: {error}. Copy it again.") from None
        self._specs = {
            name: TensorSpec(part[...].dtype if not part.get_shape() else part[:0].dtype, tuple(part.get_shape()))
            for name, part in self._slices.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._slices))

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._specs:
            raise unknown_tensor(self.path, name)
        return self._specs[name]

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        spec = self.spec(name)
        if not out.numel():
            return
        row = spec.elements // spec.shape[0] if spec.shape else 1
        first, last = start // row, -(-(start + out.numel()) // row)
        rows = self._slices[name][first:last] if spec.shape else self._slices[name][...]
        out.copy_(rows.reshape(-1)[start - first * row :][: out.numel()])
