"""What torch finds on this machine: its build and the GPUs that it can use.

A launcher imports no torch, so it asks a child process, `python -m btm_scale.util.device_query`. Neither device nodes
nor version numbers answer this: a container renumbers its GPUs, and a driver may be too old for the build of torch.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from btm_scale.util.mpi import without_mpi

if TYPE_CHECKING:
    import torch

# Which GPUs a process may use. HIP applies ROCR_VISIBLE_DEVICES first, and takes CUDA's variable if its own is not set.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

_SECONDS = 180.0  # importing torch from a cold network file system takes a minute
_WARNING_LENGTH = 300


@dataclass(frozen=True)
class TorchDevices:
    """A build of torch, `CPU`, `CUDA 12.8` or `ROCm 6.4`, and the name of each GPU that it can use, in its order.

    `problem` is what torch reports if it can use none, or why it cannot be imported.
    """

    build: str
    gpus: tuple[str, ...] = ()
    problem: str = ""


def ask_torch() -> TorchDevices:
    """Return what torch finds, from a child process that takes seconds; it is asked once per choice of visible GPUs."""
    return _ask_torch(tuple(os.environ.get(name) for name in VISIBLE))


def torch_devices() -> TorchDevices:
    """Return what the torch of this process finds, without creating a CUDA context."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        is_available = torch.cuda.is_available()
    build = "CPU"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    if not is_available:
        lines = str(caught[0].message).splitlines() if caught else []
        return TorchDevices(build, problem=lines[0][:_WARNING_LENGTH] if lines else "")
    return TorchDevices(build, tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))))


def name_of(device: torch.device) -> str:
    """Return the name of a device as its driver reports it, or `CPU (x86_64)`."""
    if device.type != "cuda":
        return f"CPU ({platform.machine()})"
    import torch

    return torch.cuda.get_device_name(device)


@functools.cache
def _ask_torch(visible: tuple[str | None, ...]) -> TorchDevices:
    command = [sys.executable, "-m", "btm_scale.util.device_query"]
    try:
        done = subprocess.run(
            command, env=without_mpi(os.environ), capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return TorchDevices("unknown", problem=f"torch did not answer within {_SECONDS:.0f} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return TorchDevices("unknown", problem=f"torch cannot be used ({lines[-1][:_WARNING_LENGTH]})")
    answer = json.loads(done.stdout.splitlines()[-1])
    return TorchDevices(answer["build"], tuple(answer["gpus"]), answer["problem"])


if __name__ == "__main__":
    print(json.dumps(asdict(torch_devices())))
