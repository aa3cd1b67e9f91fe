"""Deterministic training on a GPU: the same bits from the same config, layout and kind of GPU, run after run."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Let this process use only kernels that add in a fixed order. Call it before anything runs on the GPU.

    An operator without such a kernel raises an error. Flash attention then has a slower backward pass, which adds the
    gradients of queries in order, and cuDNN's attention, which has none, is off.
    """
    # cuBLAS reads it when it starts. Without a fixed workspace, streams that share one may pick other kernels.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Filling new memory makes uses of uninitialized values reproducible; there are none, and it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
