"""Read PyTorch files without executing their pickles: tensors become file locations, the rest plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.archive import Archive
from btm_scale.checkpoint.formats.inert import Inert
from btm_scale.checkpoint.formats.stored import Segment, StoredTensor
from btm_scale.checkpoint.formats.tensors import TensorSpec, are_naturals, is_shape
from btm_scale.checkpoint.formats.unpickler import Unpickler
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import read_bounded, shown

__all__ = ["Inert", "load_embedded", "load_pickle", "load_plain_pickle"]

_MAX_REPEATED = 64 << 20  # bytes of a tensor whose strides repeat elements of its storage
_MAX_PICKLE = 128 << 20


@dataclass(frozen=True)
class _Storage:
    file: Path
    offset: int
    dtype: torch.dtype
    elements: int


def load_pickle(path: Path) -> Any:
    """Return what `torch.save` wrote to `path`, with tensors as `StoredTensor` and other classes as `Inert`.

    Raises `CheckpointError` for files that are truncated, older than PyTorch 1.6, or would run code.
    """
    return _readable(path, lambda: _load(path), "as a torch.save file")


def load_embedded(path: Path, start: int, length: int) -> Any:
    """Like `load_pickle`, from the `length` bytes at `start`."""
    return _readable(path, lambda: _load(path, start, length), f"at byte {start}")


def load_plain_pickle(path: Path) -> Any:
    """Load a pickle without tensors, such as the `.metadata` of a distributed checkpoint.

    Raises `CheckpointError` like `load_pickle`.
    """

    def no_storage(_: Any) -> Any:
        raise ValueError("a tensor, which it may not have")

    return _readable(
        path, lambda: Unpickler(read_bounded(path, _MAX_PICKLE), path, {}, no_storage).load(), "as a pickle"
    )


def _readable(path: Path, load: Callable[[], Any], how: str) -> Any:
    try:
        return load()
    except CheckpointError:
        raise
    except Exception as error:  # a truncated or hostile pickle can fail in any way
        reason = shown(str(error) or type(error).__name__, 200)[1:-1]
        raise CheckpointError(f"{path} cannot be read {how} ({reason}). Copy it again, or save it again.") from error


def _load(path: Path, start: int = 0, length: int | None = None) -> Any:
    with path.open("rb") as file:
        archive = Archive(path, file, start, length)
        storages: dict[str, _Storage] = {}

        def storage(reference: Any) -> _Storage:
            _, dtype, key, _, elements = reference
            if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not is_shape((elements,)):
                raise CheckpointError(f"{path} has an invalid storage, {shown(reference, 100)}. Save it again.")
            extent = archive.extent(f"data/{key}")
            if elements * dtype.itemsize != extent.nbytes:
                raise CheckpointError(
                    f"{path}: storage '{key:.80}' has {extent.nbytes} bytes; {elements} elements of {dtype} need "
                    f"{elements * dtype.itemsize}. Save it again."
                )
            place = _Storage(path, extent.offset, dtype, elements)
            if storages.setdefault(key, place) != place:
                raise CheckpointError(f"{path} describes storage '{key:.80}' in two ways. Save it again.")
            return place

        return Unpickler(archive.read("data.pkl"), path, _REBUILDERS, storage).load()


def _rebuild_tensor_v2(
    storage: Any, start: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, lazy: Any = None
) -> StoredTensor:
    if lazy:
        raise CheckpointError(
            f"{storage.file} has a tensor with a pending operation, {shown(lazy)}. Save it after resolve_conj() and "
            "resolve_neg()."
        )
    return _rebuild_tensor(storage, start, shape, stride)


def _rebuild_tensor(storage: Any, start: Any, shape: Any, stride: Any) -> StoredTensor:
    if not isinstance(storage, _Storage):
        raise TypeError(f"a tensor in {shown(storage)}")
    valid = is_shape((start,)) and is_shape(shape) and are_naturals(stride) and len(shape) == len(stride)
    if not valid:
        raise CheckpointError(
            f"{storage.file} has a tensor with offset {shown(start)}, shape {shown(shape)} and stride {shown(stride)}. "
            "Each must be of natural numbers. Save it again."
        )
    spec = TensorSpec(storage.dtype, tuple(shape))
    contiguous = _contiguous(spec.shape, tuple(stride))
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if spec.elements else 0
    if start + extent > storage.elements:
        raise CheckpointError(f"{storage.file} has a tensor that extends past its storage. Save it again.")
    if spec.elements > extent and spec.nbytes > _MAX_REPEATED:
        raise CheckpointError(
            f"{storage.file} has a tensor of {spec.nbytes} bytes whose strides repeat {extent} elements. At most "
            f"{_MAX_REPEATED >> 20} MiB may be repeated: save a contiguous copy."
        )
    stored = spec.elements if contiguous else extent
    segment = Segment(storage.file, storage.offset + start * storage.dtype.itemsize, stored)
    return StoredTensor(spec, (segment,), None if contiguous else tuple(stride))


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether a stride is row-major; that of a dimension of size 1 does not matter."""
    expected = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return 0 in shape or all(
        size == 1 or step == wanted for size, step, wanted in zip(shape, stride, expected, strict=True)
    )


def _rebuild_parameter(data: Any, _grad: Any, _hooks: Any) -> Any:
    return data


def _rebuild_parameter_with_state(data: Any, _grad: Any, _hooks: Any, _state: Any) -> Any:
    return data


def _rebuild_from_type(rebuild: Any, _type: Any, arguments: Any, _state: Any) -> Any:
    return rebuild(*arguments)


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
