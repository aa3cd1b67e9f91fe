"""Run an operator with the largest block shape that the GPU accepts, otherwise as PyTorch operations.

A shape that was refused is not tried again in this process. Every fallback is logged once.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from btm_scale.kernels.hardware import Hardware, hardware, is_interpreted, on_device
from btm_scale.kernels.layer_tuning import ColumnsConfig, RotaryConfig
from btm_scale.kernels.loss_tuning import LossConfig
from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig

logger = logging.getLogger(__name__)

Config = TypeVar("Config", ScoreConfig, MixConfig, LossConfig, ColumnsConfig, RotaryConfig)
AnyConfig = ScoreConfig | MixConfig | LossConfig | ColumnsConfig | RotaryConfig
Result = TypeVar("Result")


class KernelPath(NamedTuple):
    """How an operator ran: `triton` with a block shape, or `reference`, PyTorch operations without one."""

    operator: str
    backend: str
    config: AnyConfig | None

    def __str__(self) -> str:
        return self.backend if self.config is None else f"{self.backend} {self.config.blocks}"


_last: dict[str, KernelPath] = {}
_refused: set[tuple[str, Hardware, AnyConfig]] = set()
_host_is_broken = False


def last_path(operator: str | None = None) -> KernelPath | None:
    """Return how the last call of an operator ran in this process, or the last of any; None before the first."""
    return _last.get(operator) if operator else next(reversed(_last.values()), None)


def refusals() -> set[tuple[str, Hardware, AnyConfig]]:
    """Return the shapes that a GPU refused in this process."""
    return set(_refused)


def forget_refusals() -> None:
    """Try every shape again, as in a new process."""
    global _host_is_broken
    _refused.clear()
    _last.clear()
    _host_is_broken = False


def run(
    operator: str,
    tensor: Tensor,
    configs: Callable[[Hardware], Sequence[Config]],
    launch: Callable[[Config], Result],
    reference: Callable[[], Result],
) -> Result:
    """Return the result of the first of `configs` that the device of `tensor` accepts, otherwise of `reference`.

    `launch` runs with that device as the current one, and is called again with the next shape if Triton cannot compile
    or load a kernel. Other errors, such as an illegal memory access, are raised.
    """
    device = hardware(tensor.device)
    shapes = [] if _host_is_broken else [c for c in configs(device) if (operator, device, c) not in _refused]
    for index, config in enumerate(shapes):
        try:
            with on_device(tensor):
                result = launch(config)
        except Exception as error:
            if is_interpreted():
                raise
            if _is_host_problem(error):
                stop_using_triton(error)
                break
            if not _is_refused_shape(error):
                raise
            _refuse(operator, device, config, error, shapes[index + 1 :])
        else:
            _remember(KernelPath(operator, "triton", config))
            return result
    result = reference()
    _remember(KernelPath(operator, "reference", None))
    return result


def run_reference(operator: str, reference: Callable[[], Result]) -> Result:
    """Return the result of PyTorch operations, for tensors that Triton does not serve."""
    result = reference()
    _remember(KernelPath(operator, "reference", None))
    return result


def _remember(path: KernelPath) -> None:
    _last.pop(path.operator, None)  # the newest is the last in the dict
    _last[path.operator] = path


def _is_refused_shape(error: Exception) -> bool:
    """Return whether a kernel needs more than the device has, or the compiler gave up on it."""
    if type(error).__module__.partition(".")[0] == "triton":  # OutOfResources, PTXASError, CompilationError
        return True
    # A pass of the compiler that fails. Subclasses are PyTorch's: out of memory, an error on the device.
    return type(error) is RuntimeError and "PassManager" in str(error)


def _is_host_problem(error: Exception) -> bool:
    """Return whether Triton cannot launch anything here: no C compiler or Python headers, no driver, an old driver."""
    if isinstance(error, ImportError | OSError | subprocess.CalledProcessError):
        return True
    hints = ("C compiler", "active drivers", "kernel image", "unsupported toolchain", "libcuda", "libamdhip")
    return type(error) in (RuntimeError, AssertionError) and any(hint in str(error) for hint in hints)


def stop_using_triton(error: Exception) -> None:
    """Run everything as PyTorch operations from now on, and log why, once."""
    global _host_is_broken
    if _host_is_broken:
        return
    _host_is_broken = True
    logger.warning(
        "Triton cannot launch kernels on this machine (%s). All of them run as PyTorch operations, which is "
        "slower. Triton needs a C compiler, Python's headers and a driver that is not older than its PTX.",
        _summary(error),
    )


def _refuse(
    operator: str,
    device: Hardware,
    config: AnyConfig,
    error: Exception,
    smaller: Sequence[AnyConfig],
) -> None:
    _refused.add((operator, device, config))
    logger.warning(
        "%s does not run with blocks of %s on %s (%s). It runs %s.",
        operator,
        config.blocks,
        device.arch,
        _summary(error),
        f"with blocks of {smaller[0].blocks}" if smaller else "as PyTorch operations, which is slower",
    )


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
