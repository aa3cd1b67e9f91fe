"""Training on a CPU: replace CUDA calls, do not compile an operator, and reuse freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import os

import torch


def leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an operator that holds 69 MB of shared memory per rank on machines without a GPU.

    Its backend for gloo loads the operator whenever it can, for `inference_all_reduce`, which training never calls.
    """
    import deepspeed

    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    deepspeed.ops.__compatible_ops__[builder.NAME] = False


def replace_cuda() -> None:
    """Let Megatron-core, which calls CUDA for its device in places, run without a GPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them to the kernel and faulting them in again.

    A step on a CPU allocates and frees the same activations again and again; this saves a tenth of its time.
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
