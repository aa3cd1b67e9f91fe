"""Tensors as locations in files: the basis of every reader except safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from btm_scale.checkpoint.formats.safetensors import pread_into
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, unknown_tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive elements in a file, from byte `offset`."""

    file: Path
    offset: int
    elements: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor stored in one or more segments, row-major unless `stride` is given."""

    spec: TensorSpec
    segments: tuple[Segment, ...]
    stride: tuple[int, ...] | None = None

    def read_into(self, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`; a strided tensor is read in full."""
        if out.dtype != self.spec.dtype:
            raise TypeError(f"{self.spec.dtype} cannot be read as {out.dtype}")
        if self.stride is not None:
            (segment,) = self.segments
            stored = torch.empty(segment.elements, dtype=self.spec.dtype)
            _read(segment, 0, stored)
            flat = stored.as_strided(self.spec.shape, self.stride).reshape(-1)
            out.copy_(flat[start : start + out.numel()])
            return
        filled = 0
        for segment in self.segments:
            skip = min(start, segment.elements)
            take = min(segment.elements - skip, out.numel() - filled)
            _read(segment, skip, out[filled : filled + take])
            start, filled = start - skip, filled + take
        if filled < out.numel():
            raise IndexError(f"{out.numel()} elements extend {out.numel() - filled} past the end of the tensor")

    def read(self) -> torch.Tensor:
        """Return the full tensor."""
        out = torch.empty(self.spec.elements, dtype=self.spec.dtype)
        self.read_into(0, out)
        return out.reshape(self.spec.shape)

    def part(self, start: int, stop: int) -> tuple[Segment, ...]:
        """Return the segments of elements `[start, stop)` of a row-major tensor."""
        result, size = [], self.spec.dtype.itemsize
        for segment in self.segments:
            begin, end = max(start, 0), min(stop, segment.elements)
            if begin < end:
                result.append(Segment(segment.file, segment.offset + begin * size, end - begin))
            start, stop = start - segment.elements, stop - segment.elements
        return tuple(result)


def _read(segment: Segment, skip: int, out: torch.Tensor) -> None:
    if not out.numel():
        return
    descriptor = os.open(segment.file, os.O_RDONLY)
    try:
        pread_into(descriptor, out, segment.offset + skip * out.dtype.itemsize, segment.file)
    finally:
        os.close(descriptor)


class StoredModel(ModelReader):
    """A model of stored tensors."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self._tensors = dict(sorted(tensors.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape."""
        if name not in self._tensors:
            raise unknown_tensor(self.path, name)
        return self._tensors[name].spec

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with row-major elements from `start`."""
        self.spec(name)
        self._tensors[name].read_into(start, out)
