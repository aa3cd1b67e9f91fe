"""Training on a CPU: replacements for CUDA calls, an operator that is not compiled, and memory that is reused."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch


def leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an operator, and holding 69 MB of shared memory a rank, on machines without a GPU.

    Its backend for gloo loads the operator whenever it can, for `inference_all_reduce`, which training never calls.
    """
    import deepspeed

    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    deepspeed.ops.__compatible_ops__[builder.NAME] = False


def replace_cuda() -> None:
    """Let Megatron-core, which asks CUDA for its device in places, run where there is no GPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them to the kernel and faulting them in again.

    A step on CPU takes and frees the same activations over and over; this is worth a tenth of its time.
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
