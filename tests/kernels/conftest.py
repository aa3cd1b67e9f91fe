"""Triton chooses between interpreting and compiling when imported, so `interpreted/` runs in its own process."""

import os

collect_ignore = ["test_kernels_compiled.py" if os.environ.get("TRITON_INTERPRET") == "1" else "interpreted"]
