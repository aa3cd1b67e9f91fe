"""Figures of accelerators, as their makers state them, and what of them a training reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from btm_scale.errors import LaunchError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gpu:
    """Dense 16-bit matrix products in FLOP/s; memory in bytes and bytes/s; links in bytes/s one way, of one GPU."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float  # to the others of its node
    network: float  # to other nodes

    # Shares of the stated figures that large matrix products, copies and rings reach.
    compute_share: float = 0.55
    transfer_share: float = 0.8
    half: Literal["bf16", "fp16"] = "bf16"  # the 16-bit precision that it computes in natively


_GB = 1e9
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", 125e12, 32 * _GB, 900 * _GB, 150 * _GB, 12.5 * _GB, half="fp16"),
        Gpu("a100", 312e12, 80 * _GB, 2039 * _GB, 300 * _GB, 25 * _GB),
        Gpu("l40s", 362e12, 48 * _GB, 864 * _GB, 32 * _GB, 25 * _GB),
        Gpu("h100", 989e12, 80 * _GB, 3350 * _GB, 450 * _GB, 50 * _GB),
        Gpu("h200", 989e12, 141 * _GB, 4800 * _GB, 450 * _GB, 50 * _GB),
        Gpu("b200", 2250e12, 180 * _GB, 8000 * _GB, 900 * _GB, 50 * _GB),
        Gpu("mi300x", 1307e12, 192 * _GB, 5300 * _GB, 448 * _GB, 50 * _GB),
    )
}


def gpu_named(name: str) -> Gpu:
    """Raises LaunchError for a name that is not in the table."""
    if name not in GPUS:
        raise LaunchError(f"no figures of a GPU called '{name}'; choose one of {', '.join(GPUS)}")
    return GPUS[name]


# Dense matrix products in bf16 or fp16, in operations a second (NVIDIA's data sheets, without sparsity); the first
# name that a device's own contains.
_HALF_PRECISION = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "A10": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that one device can do at the most in this precision; None where nobody has said."""
    if device.type != "cuda" or precision == "fp32":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _HALF_PRECISION.items() if known in name), None)
