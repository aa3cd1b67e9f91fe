"""Environment variables for training on GPUs, which CUDA and PyTorch read when they start."""

from __future__ import annotations

import os

import torch

from btm_scale.config.layout import Layout


def set_gpu_defaults(layout: Layout) -> None:
    """Set variables that are not set yet. Call this before anything uses the GPU."""
    # Segments that grow can be reused for tensors of any size, such as those of a longer batch.
    allocator = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if torch.version.cuda and not any(name in os.environ for name in allocator):
        os.environ[allocator[0]] = "expandable_segments:True"
    if layout.tensor > 1:
        # Megatron-core starts a collective before the product that it overlaps with, and relies on this order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
