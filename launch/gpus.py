"""Data sheet figures of each GPU, used by the planner's estimates and the trainer's utilisation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from btm_scale.errors import LaunchError, unknown_name


@dataclass(frozen=True)
class Gpu:
    """Peak of dense matrix products in FLOP/s per precision; memory in bytes; bandwidths in bytes/s of one GPU."""

    name: str
    devices: tuple[str, ...]  # words of the device names that drivers report
    bf16: float | None  # None: the GPU has no bfloat16 units
    fp16: float
    fp32: float  # without TF32, which training does not use
    memory: float
    bandwidth: float
    link: float  # one way, to the other GPUs of its node
    network: float  # one way, to other nodes
    float8: bool = False  # whether it multiplies float8 (e4m3fn) matrices

    # Fractions of these figures that large matrix products, copies and rings reach.
    compute_share: float = 0.55
    transfer_share: float = 0.8

    @property
    def half(self) -> Literal["bf16", "fp16"]:
        """The 16-bit precision that the GPU supports natively."""
        return "fp16" if self.bf16 is None else "bf16"

    def peak(self, precision: str) -> float:
        """Return the FLOP/s in a precision. A GPU without bfloat16 units computes it in float32."""
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": None}[precision] or self.fp32


def _gpu(
    name: str,
    *devices: str,
    half: float,
    fp32: float,
    memory: float,
    bandwidth: float,
    link: float,
    network: float,
    bf16: bool = True,
    float8: bool = False,
) -> Gpu:
    """A row in TFLOP/s, GB and GB/s; `half` is the peak in both 16-bit formats, or of fp16 alone."""
    half, giga = half * 1e12, 1e9
    return Gpu(
        name,
        devices,
        bf16=half if bf16 else None,
        fp16=half,
        fp32=fp32 * 1e12,
        memory=memory * giga,
        bandwidth=bandwidth * giga,
        link=link * giga,
        network=network * giga,
        float8=float8,
    )


# From the vendors' data sheets, without sparsity. Links are NVLink, Infinity Fabric or PCIe; bridges that join pairs of
# PCIe cards do not count, because a group may span more than a pair. Networks are those of common servers.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("v100", "V100", half=125, fp32=15.7, memory=32, bandwidth=900, link=150, network=12.5, bf16=False),
        _gpu("t4", "T4", half=65, fp32=8.1, memory=16, bandwidth=320, link=16, network=6.25, bf16=False),
        _gpu("a10", "A10", half=125, fp32=31.2, memory=24, bandwidth=600, link=32, network=12.5),
        _gpu("a40", "A40", half=150, fp32=37.4, memory=48, bandwidth=696, link=32, network=25),
        _gpu("a100-40gb", "A100 40GB", half=312, fp32=19.5, memory=40, bandwidth=1555, link=300, network=25),
        _gpu("a100", "A100", half=312, fp32=19.5, memory=80, bandwidth=2039, link=300, network=25),
        _gpu("a800", "A800", half=312, fp32=19.5, memory=80, bandwidth=2039, link=200, network=25),
        _gpu("l4", "L4", half=121, fp32=30.3, memory=24, bandwidth=300, link=32, network=12.5, float8=True),
        _gpu("l40", "L40", half=181, fp32=90.5, memory=48, bandwidth=864, link=32, network=25, float8=True),
        _gpu("l40s", "L40S", half=362, fp32=91.6, memory=48, bandwidth=864, link=32, network=25, float8=True),
        _gpu("h100", "H100", half=989, fp32=67, memory=80, bandwidth=3350, link=450, network=50, float8=True),
        _gpu("h100-pcie", "H100 PCIe", half=756, fp32=51, memory=80, bandwidth=2000, link=64, network=50, float8=True),
        _gpu("h100-nvl", "H100 NVL", half=835, fp32=60, memory=94, bandwidth=3900, link=64, network=50, float8=True),
        _gpu("h200", "H200", half=989, fp32=67, memory=141, bandwidth=4800, link=450, network=50, float8=True),
        _gpu("gh200", "GH200", half=989, fp32=67, memory=96, bandwidth=4000, link=450, network=50, float8=True),
        _gpu("b200", "B200", half=2250, fp32=75, memory=180, bandwidth=8000, link=900, network=50, float8=True),
        _gpu("gb200", "GB200", half=2500, fp32=80, memory=186, bandwidth=8000, link=900, network=50, float8=True),
        _gpu("mi300x", "MI300X", half=1307, fp32=163.4, memory=192, bandwidth=5300, link=448, network=50),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU with a name of the table, in lower or upper case. Raises LaunchError for any other name."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise LaunchError(unknown_name("GPU", name, GPUS))
    return gpu


def gpu_of_device(device: str) -> Gpu | None:
    """Return the GPU that a driver reports as `device`, such as "NVIDIA A100-SXM4-80GB"; None for an unknown one.

    If several rows match, the one with the most words wins: an H100 PCIe is not an H100 (SXM).
    """
    words = _words(device)
    known = [(len(_words(name)), gpu) for gpu in GPUS.values() for name in gpu.devices if _words(name) <= words]
    return max(known, key=lambda match: match[0])[1] if known else None


def _words(device: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", device.lower()))
