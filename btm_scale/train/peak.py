"""The most that a device can compute, by its data sheet: what a model's speed is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
