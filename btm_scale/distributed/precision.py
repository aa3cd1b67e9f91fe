"""The precisions that a device can train in, and the one in which it trains fast.

Launchers import no torch, so they ask a child process.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from btm_scale.errors import LaunchError
from btm_scale.util.devices import Device, environment_of_ranks

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp16", "fp32"]

_MARGIN = 1.2  # bf16 must be faster than fp32 by this factor, so that noise does not decide
_ROUNDS = 5


@dataclass(frozen=True)
class DevicePrecisions:
    """A device: its name, the precisions that it can train in, and the one that `auto` resolves to."""

    device: str
    possible: tuple[Precision, ...]
    fast: Precision

    def require(self, precisions: Iterable[str]) -> None:
        """Raise LaunchError if the device cannot train in one of the precisions."""
        _require(precisions, self.possible, self.device)


@functools.cache
def ask_device(device: Device = "auto") -> DevicePrecisions:
    """Query this machine's device, of launch.device. Raises LaunchError if torch or DeepSpeed cannot be imported.

    It takes a few seconds: the child imports torch and DeepSpeed, and times a training step on a CPU.
    """
    command = [sys.executable, "-m", "btm_scale.distributed.precision"]
    environment = os.environ | environment_of_ranks(device)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaunchError(
            "Cannot determine which precisions this machine can train in: importing torch and DeepSpeed failed. "
            f"Fix the installation; it printed:\n{done.stderr[-2000:]}"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    return DevicePrecisions(answer["device"], tuple(answer["possible"]), answer["fast"])


def possible_precisions() -> tuple[Precision, ...]:
    """Return the precisions that DeepSpeed's engine accepts on this process's device."""
    accelerator = _accelerator()
    supported: dict[Precision, bool] = {
        "bf16": bool(accelerator.is_bf16_supported()),
        "fp16": bool(accelerator.is_fp16_supported()),
        "fp32": True,
    }
    return tuple(precision for precision, is_supported in supported.items() if is_supported)


def fast_precision() -> Precision:
    """Return the precision in which this process's device trains fast: queried on a GPU, measured on a CPU."""
    import torch

    possible = possible_precisions()
    if not torch.cuda.is_available():
        return "bf16" if "bf16" in possible and _bf16_speedup() >= _MARGIN else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16" if "fp16" in possible else "fp32"


def require_possible(precision: str) -> None:
    """Raise LaunchError if this process's device cannot train in the precision."""
    # Every engine trains in float32; importing DeepSpeed to ask would be wasted.
    if precision not in ("fp32", "auto"):
        _require([precision], possible_precisions(), device_name())


def device_name() -> str:
    """Return `this CPU (x86_64)`, or the name of this process's GPU."""
    import platform

    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"this CPU ({platform.machine()})"


def _require(precisions: Iterable[str], possible: tuple[str, ...], device: str) -> None:
    refused = sorted(set(precisions) - {"auto", *possible})
    if refused:
        raise LaunchError(
            f"Cannot train in {' and '.join(refused)} on {device}. layout.precision must be one that the device "
            f"supports: set it to {', '.join(possible)} or auto."
        )


def _accelerator() -> Any:
    """Return DeepSpeed's accelerator, which its engine queries."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    return get_accelerator()


def _bf16_speedup() -> float:
    """Return the speedup of a training step in bf16 over fp32 on this CPU.

    CPU flags do not answer this: ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY restrict what the libraries use, and a CPU
    without bf16 instructions emulates them. One thread and the minimum of a few interleaved rounds limit the
    influence of other work on the machine.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            steps = [_training_step(torch.float32), _training_step(torch.bfloat16)]
        first = [_seconds(step) for step in steps]
        if first[1] > 4 * first[0]:  # emulated: more rounds would take long and say the same
            return first[0] / first[1]
        rounds = [[_seconds(step) for step in steps] for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    fp32, bf16 = (min(times) for times in zip(*rounds, strict=True))
    return fp32 / bf16


def _training_step(dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that runs forward and backward of one layer and its loss, at the sizes of preset llama-4m."""
    import torch
    from torch.nn import functional

    tokens, hidden, heads, ffn, vocabulary = 256, 256, 4, 688, 2048

    def parameter(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape)).to(dtype).requires_grad_()

    embedded, scale = parameter(tokens, hidden), parameter(hidden)
    query_key_value, projection = parameter(hidden, 3 * hidden), parameter(hidden, hidden)
    gate, up, down = parameter(hidden, ffn), parameter(hidden, ffn), parameter(ffn, hidden)
    head, targets = parameter(hidden, vocabulary), torch.randint(vocabulary, (tokens,))
    parameters = (embedded, scale, query_key_value, projection, gate, up, down, head)

    def step() -> None:
        for tensor in parameters:
            tensor.grad = None
        normed = functional.rms_norm(embedded, (hidden,), scale)
        query, key, value = (normed @ query_key_value).view(tokens, 3, heads, -1).permute(1, 2, 0, 3)
        attended = functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)
        middle = embedded + attended[0].transpose(0, 1).reshape(tokens, hidden) @ projection
        normed = functional.rms_norm(middle, (hidden,), scale)
        output = middle + (functional.silu(normed @ gate) * (normed @ up)) @ down
        functional.cross_entropy((output @ head).float(), targets).backward()

    return step


def _seconds(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(json.dumps(asdict(DevicePrecisions(device_name(), possible_precisions(), fast_precision()))))
