"""One table of GPUs for the planner and for the trainer's utilisation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from btm_scale.launch.gpus import GPUS, gpu_named, gpu_of_device
from btm_scale.train.metrics import peak_flops

DEVICES = {
    "Tesla V100-SXM2-32GB": "v100",
    "Tesla T4": "t4",
    "NVIDIA A10": "a10",
    "NVIDIA A40": "a40",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA A800-SXM4-80GB": "a800",
    "NVIDIA L4": "l4",
    "NVIDIA L40": "l40",
    "NVIDIA L40S": "l40s",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA B200": "b200",
    "NVIDIA GB200": "gb200",
    "AMD Instinct MI300X": "mi300x",
}


def test_every_gpu_of_the_table_is_known_by_the_name_that_its_driver_reports() -> None:
    found = {device: gpu_of_device(device) for device in DEVICES}
    assert {device: gpu.name for device, gpu in found.items() if gpu} == DEVICES
    assert set(DEVICES.values()) == set(GPUS)


def test_a_gpu_can_be_named_in_upper_case() -> None:
    assert gpu_named("H100-NVL") is GPUS["h100-nvl"]


@pytest.mark.parametrize("device", ["NVIDIA A10G", "NVIDIA GeForce RTX 4090", "NVIDIA H1000", "cpu"])
def test_a_gpu_without_a_data_sheet_is_not_taken_for_another(device: str) -> None:
    assert gpu_of_device(device) is None


def test_figures_are_in_flops_and_bytes() -> None:
    for gpu in GPUS.values():
        assert gpu.fp32 < gpu.fp16 < 1e16
        assert 16e9 <= gpu.memory < 1e12
        assert gpu.network < gpu.bandwidth
        assert gpu.link < gpu.bandwidth < 1e14


def test_a_gpu_without_bfloat16_units_computes_it_in_float32() -> None:
    assert GPUS["v100"].peak("fp16") == 125e12
    assert GPUS["v100"].peak("bf16") == GPUS["v100"].peak("fp32") == 15.7e12
    assert GPUS["a100"].peak("bf16") == GPUS["a100"].peak("fp16") == 312e12


def test_utilisation_is_of_the_figures_that_plans_are_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    device: Any = SimpleNamespace(type="cuda")
    assert peak_flops(device, "bf16") == GPUS["mi300x"].bf16
    assert peak_flops(device, "fp32") == GPUS["mi300x"].fp32
    assert peak_flops(torch.device("cpu"), "bf16") is None
