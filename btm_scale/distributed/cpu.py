"""What stands in for CUDA, and is left out, where there is no GPU."""

from __future__ import annotations

import os

import torch


def _leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling an operator, and holding 69 MB of shared memory a rank, on machines without a GPU.

    Its backend for gloo loads the operator whenever it can, for `inference_all_reduce`, which training never calls.
    """
    import deepspeed

    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    deepspeed.ops.__compatible_ops__[builder.NAME] = False


def _stand_in_for_cuda() -> None:
    """Let Megatron-core, which asks CUDA for its device in places, run where there is no GPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
