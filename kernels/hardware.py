"""What a GPU is, as PyTorch reports it, and the guard that makes a tensor's GPU the current one."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Hardware(NamedTuple):
    """Vendor (`nvidia`, `amd` or `interpreter`), architecture as Triton names it, shared memory per block in bytes."""

    vendor: str
    arch: str
    shared_bytes: int
    multiprocessors: int = 1


INTERPRETER = Hardware("interpreter", "interpreter", 1 << 40)


@functools.cache
def hardware(device: torch.device) -> Hardware:
    """Return what runs the kernels of tensors on a device: its GPU, or Triton's interpreter for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    properties: Any = torch.cuda.get_device_properties(device)
    # Triton requests the larger opt-in limit, which not every build of PyTorch reports.
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    multiprocessors = properties.multi_processor_count
    if torch.version.hip:
        return Hardware("amd", properties.gcnArchName.split(":")[0], shared, multiprocessors)
    return Hardware("nvidia", f"sm_{properties.major}{properties.minor}", shared, multiprocessors)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches on the current device and its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def is_interpreted() -> bool:
    """Return whether Triton's interpreter was asked for; it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreter_problem() -> str | None:
    """Return why the installed Triton cannot interpret kernels, or None if it can."""
    triton, numpy = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        return (
            f"The interpreter of Triton {triton} does not run on NumPy {numpy}: it converts arrays of one element to "
            "numbers, which NumPy 2.4 refuses. Install triton>=3.7 or numpy<2.4."
        )
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
