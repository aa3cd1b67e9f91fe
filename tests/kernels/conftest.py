"""Triton chooses between interpreting and compiling when imported, so `interpreted/` runs in its own process."""

import os

COMPILED = [
    "test_kernels_compiled.py",
    "test_kernels_launches.py",
    "test_kernels_layer.py",
    "test_kernels_loss.py",
    "test_kernels_older_triton.py",
    "test_kernels_resources.py",
]
collect_ignore = COMPILED if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
