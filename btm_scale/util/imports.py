"""Importing large libraries: without torch's compiler where it would compile nothing, and without their warnings."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any


def import_uncompiled(module: str) -> None:
    """Import a module, ahead of whoever uses it; what it would have compiled stays as it is on machines without a GPU.

    Megatron-core and DeepSpeed hand functions to `torch.compile` when they are imported, which loads the compiler: a
    third of what a rank takes to start. On a CPU none of these functions is ever called.
    """
    import torch

    if torch.cuda.is_available():
        return
    compiling = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module(module)
    finally:
        torch.compile = compiling


def _as_it_is(function: Any = None, **options: Any) -> Any:
    return _as_it_is if function is None else function


def silence_megatron() -> None:
    """Ignore what Megatron-core warns of at every import: which optional packages it works without."""
    for message in ("Transformer Engine and Apex", "Apex is not installed"):
        warnings.filterwarnings("ignore", message)
        # And in the processes that this one starts.
        others = os.environ.get("PYTHONWARNINGS")
        if message not in (others or ""):
            os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [others, f"ignore:{message}"]))
