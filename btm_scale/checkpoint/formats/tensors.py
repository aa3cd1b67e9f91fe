"""The common interface of readers and writers of weights: named tensors, read by flat ranges."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard

import numpy as np

from btm_scale.errors import CheckpointError, unknown_name
from btm_scale.util.imports import torch

# torch's name and the size in bytes of each of safetensors' dtypes.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "U16": ("uint16", 2),
    "U32": ("uint32", 4),
    "U64": ("uint64", 8),
    "BOOL": ("bool", 1),
}
FP8 = ("F8_E4M3", "F8_E5M2")
_CODES = {name: code for code, (name, _) in DTYPES.items()}
_OTHER_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}


def parse_code(name: str) -> str:
    """Return safetensors' code of the floating-point dtype called `name` (`bfloat16`, `bf16`, `float32`, ...).

    Raises `CheckpointError` for any other name, and for fp8, which means nothing without scales.
    """
    name = name.removeprefix("torch.")
    full = _OTHER_NAMES.get(name, name)
    if full.startswith("float8_"):
        raise CheckpointError(
            f"Weights in {full} need scales, which are not written. Choose bfloat16 or float16, and quantize the "
            "result with a quantization tool."
        )
    if not full.startswith(("float", "bfloat")) or full not in _CODES:
        raise CheckpointError(unknown_name("dtype", name, ("bfloat16", "float16", "float32", "float64")))
    return _CODES[full]


def parse_dtype(name: str) -> torch.dtype:
    """Return the floating-point dtype called `name`. Raises like `parse_code`."""
    return dtype_of(parse_code(name))


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`, as in Hugging Face configs."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def dtype_of(code: str) -> torch.dtype:
    """Return the torch dtype of safetensors' code, or of torch's own name."""
    dtype: torch.dtype = getattr(torch, DTYPES[code][0] if code in DTYPES else code)
    return dtype


@functools.cache
def code_of(dtype: torch.dtype) -> str:
    """Return safetensors' code of a dtype, or torch's name of one that safetensors does not have."""
    return _CODES.get(dtype_name(dtype), dtype_name(dtype))


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


@dataclass(frozen=True, init=False)
class TensorSpec:
    """Dtype and shape of a tensor; only `dtype` imports torch."""

    code: str  # of the dtype, in safetensors
    shape: tuple[int, ...]

    def __init__(self, dtype: torch.dtype | str, shape: tuple[int, ...]) -> None:
        """Store the code of a dtype, which may be given itself."""
        object.__setattr__(self, "code", dtype if isinstance(dtype, str) else code_of(dtype))
        object.__setattr__(self, "shape", shape)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the spec of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return dtype_of(self.code)

    @property
    def dtype_name(self) -> str:
        """The dtype as in Hugging Face configs."""
        return DTYPES[self.code][0] if self.code in DTYPES else self.code

    @property
    def itemsize(self) -> int:
        """Size of an element in bytes."""
        return DTYPES[self.code][1] if self.code in DTYPES else self.dtype.itemsize

    @property
    def is_floating_point(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype_name.startswith(("float", "bfloat"))

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype_name} {list(self.shape)}"


def as_bytes(tensor: torch.Tensor | memoryview) -> memoryview:
    """Return a writable view of a contiguous CPU tensor's memory, without a copy; bytes are returned unchanged."""
    if isinstance(tensor, memoryview):
        return tensor
    flat = tensor.detach() if tensor.requires_grad else tensor
    array: Any = (flat if flat.dim() == 1 else flat.reshape(-1)).view(torch.uint8).numpy()
    view: memoryview = array.data
    return view


def same_bits(one: torch.Tensor | memoryview, other: torch.Tensor | memoryview) -> bool:
    """Return whether two contiguous CPU tensors have the same bytes; torch compares bytes at a tenth of the speed."""
    return bool(np.array_equal(np.frombuffer(as_bytes(one), np.uint8), np.frombuffer(as_bytes(other), np.uint8)))


class ModelReader(ABC):
    """Named tensors on disk; any flat range can be read without reading the rest.

    `names` is sorted, so it does not depend on format or sharding. A context manager; `close` is idempotent.
    """

    path: Path
    keeps_head = False  # whether the LM head is a separate weight, although config.json ties it to the embedding

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

    def kept_hashes(self, name: str) -> Sequence[str] | None:
        """Return the hashes of a tensor's blocks, if they are known of its bytes on disk."""
        return None

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which `read_into` does not round: the tensor's own, unless it is dequantized."""
        return self.spec(name).dtype

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return row-major elements `[start, stop)` as a new 1-D tensor."""
        out = torch.empty(stop - start, dtype=self.spec(name).dtype)
        self.read_into(name, start, out)
        return out

    @property
    def needs_torch(self) -> bool:
        """Whether `read_bytes` imports torch."""
        return True

    def read_bytes(self, name: str, start: int, stop: int) -> memoryview:
        """Return the bytes of row-major elements `[start, stop)`, in the tensor's dtype."""
        if stop < start:
            raise IndexError(f"Elements [{start}, {stop}) of '{name}' end before they begin")
        out = memoryview(bytearray((stop - start) * self.spec(name).itemsize))
        self.read_bytes_into(name, start, out)
        return out

    def read_bytes_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of row-major elements from `start`, in the tensor's dtype."""
        elements, rest = divmod(len(out), self.spec(name).itemsize)
        if rest:
            raise IndexError(f"{len(out)} bytes are not complete elements of '{name}', {self.spec(name)}")
        out[:] = as_bytes(self.read_range(name, start, start + elements))

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
        return sum(spec.elements * (dtype.itemsize if dtype else spec.itemsize) for spec in specs)

    def chunks(self, name: str, chunk_bytes: int) -> Iterator[torch.Tensor]:
        """Yield the tensor as consecutive flat pieces of at most `chunk_bytes`."""
        spec = self.spec(name)
        step = max(1, chunk_bytes // spec.itemsize)
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
