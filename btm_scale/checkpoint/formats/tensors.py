"""The common interface of readers and writers of weights: named tensors, read by flat ranges."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

import torch

from btm_scale.errors import CheckpointError, unknown_name

# Safetensors dtype codes.
DTYPE_BY_CODE: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
CODE_BY_DTYPE: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPE_BY_CODE.items()}
_SHORT_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def parse_dtype(name: str) -> torch.dtype:
    """Return the floating-point dtype called `name` (`bfloat16`, `bf16`, `float32`, ...).

    Raises `CheckpointError` for any other name, and for fp8, which means nothing without scales.
    """
    dtype = _SHORT_NAMES.get(name) or getattr(torch, name.removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize == 1:
        raise CheckpointError(
            f"Weights in {dtype_name(dtype)} need scales, which are not written. Choose bfloat16 or float16, and "
            "quantize the result with a quantization tool."
        )
    if not isinstance(dtype, torch.dtype) or dtype not in CODE_BY_DTYPE or not dtype.is_floating_point:
        raise CheckpointError(unknown_name("dtype", name, ("bfloat16", "float16", "float32", "float64")))
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`, as in Hugging Face configs."""
    return str(dtype).removeprefix("torch.")


_MAX_DIMENSIONS = 32
_MAX_ELEMENTS = 1 << 56  # so that offsets in bytes fit into 63 bits
_MAX_BYTES = 1 << 60


def is_shape(sizes: object) -> TypeGuard[Sequence[int]]:
    """Whether a foreign value is a shape: a list or tuple of natural numbers whose product is a possible size."""
    return are_naturals(sizes) and math.prod(max(size, 1) for size in sizes) <= _MAX_ELEMENTS


def are_naturals(values: object) -> TypeGuard[Sequence[int]]:
    """Whether a foreign value is a list or tuple of a few natural numbers, such as strides or offsets in bytes."""
    if not isinstance(values, (list, tuple)) or len(values) > _MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value <= _MAX_BYTES for value in values)


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the spec of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return a writable view of a contiguous CPU tensor's memory, without a copy."""
    flat = tensor.detach() if tensor.requires_grad else tensor
    array: Any = (flat if flat.dim() == 1 else flat.reshape(-1)).view(torch.uint8).numpy()
    view: memoryview = array.data
    return view


class ModelReader(ABC):
    """Named tensors on disk; any flat range can be read without reading the rest.

    `names` is sorted, so it does not depend on format or sharding. A context manager; `close` is idempotent.
    """

    path: Path

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's dtype and shape. Raises `CheckpointError` for an unknown name."""

    @abstractmethod
    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` (1-D, contiguous, of the tensor's dtype) with row-major elements from `start`."""

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which `read_into` does not round: the tensor's own, unless it is dequantized."""
        return self.spec(name).dtype

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return row-major elements `[start, stop)` as a new 1-D tensor."""
        out = torch.empty(stop - start, dtype=self.spec(name).dtype)
        self.read_into(name, start, out)
        return out

    def read(self, name: str) -> torch.Tensor:
        """Return the full tensor."""
        spec = self.spec(name)
        return self.read_range(name, 0, spec.elements).reshape(spec.shape)

    def specs(self) -> dict[str, TensorSpec]:
        """Return every tensor's spec by name, sorted."""
        return {name: self.spec(name) for name in self.names}

    def nbytes_as(self, dtype: torch.dtype | None) -> int:
        """Return the size in bytes of all tensors in `dtype`, or in their own dtypes if None."""
        specs = self.specs().values()
        return sum(spec.elements * (dtype or spec.dtype).itemsize for spec in specs)

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[torch.Tensor]:
        """Yield the tensor as consecutive flat pieces of at most `chunk_bytes`."""
        spec = self.spec(name)
        step = max(1, chunk_bytes // spec.dtype.itemsize)
        for start in range(0, spec.elements, step):
            yield self.read_range(name, start, min(start + step, spec.elements))

    def close(self) -> None:
        """Close open files."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unknown_tensor(path: Path, name: str) -> CheckpointError:
    """Return the error for a name that a checkpoint does not contain."""
    return CheckpointError(f"{path} has no tensor '{name}'.")
