"""Importing large libraries: without torch's compiler where it would compile nothing, or only when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


def import_uncompiled(module: str) -> None:
    """Import a module before its users do; on machines without a GPU, what it would have compiled stays as it is.

    Megatron-core and DeepSpeed hand functions to `torch.compile` when they are imported, which loads the compiler: a
    third of what a rank takes to start. On a CPU none of these functions is ever called.
    """
    import torch  # the module itself, of which an attribute is replaced

    if torch.cuda.is_available():
        return
    compiling = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        importlib.import_module(module)
    finally:
        torch.compile = compiling


def run_uncompiled_without_compiler() -> None:
    """Let functions that cannot be compiled here, such as for want of a C compiler, run as they are; torch logs why."""
    importlib.import_module("torch._dynamo").config.suppress_errors = True


def _as_it_is(function: Any = None, **options: Any) -> Any:
    return _as_it_is if function is None else function


class LazyModule(ModuleType):
    """A module that is imported when one of its names is first used: `torch = LazyModule("torch")`."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import torch as torch
else:
    torch = LazyModule("torch")  # for files that are of use without it, as in `merge --help` and in small merges
