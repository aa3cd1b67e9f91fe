"""Simulated machines with other GPUs: what torch, the driver and the environment report on them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from btm_scale.util import device_query, devices
from btm_scale.util.device_query import TorchDevices

CUDA, ROCM = "CUDA 12.8", "ROCm 6.4"
H100, MI300X, MIG = "NVIDIA H100 80GB HBM3", "AMD Instinct MI300X", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"


def fake_machine(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    *,
    torch: TorchDevices,
    nodes: Sequence[str] = (),
    mig: Sequence[str] = (),
    **environment: str,
) -> None:
    """Simulate a machine with these device nodes, on which torch gives this answer.

    `mig` are the UUIDs that nvidia-smi lists; `environment` holds the variables that choose GPUs, and SLURM's.
    """
    for name in (*device_query.VISIBLE, devices.DEVICE, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for node in nodes:
        (root / node).parent.mkdir(parents=True, exist_ok=True)
        (root / node).touch()
    monkeypatch.setattr(devices, "_ROOT", root)
    (root / "bin").mkdir()
    lines = ["GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"]
    lines += [f"  MIG 1g.10gb     Device  {number}: (UUID: {uuid})" for number, uuid in enumerate(mig)]
    (root / "bin/nvidia-smi").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(lines) + "\nEND\n")
    (root / "bin/nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(devices, "ask_torch", lambda: torch)
    monkeypatch.setattr(devices, "torch_devices", lambda: torch)


def nvidia_nodes(*numbers: int) -> list[str]:
    """Return the device nodes of NVIDIA GPUs."""
    return [*(f"dev/nvidia{number}" for number in numbers), "dev/nvidiactl"]


def amd_nodes(root: Path, cards: int, *, integrated: bool = False) -> list[str]:
    """Return the device node of AMD GPUs, and write the kernel's list of them."""
    processor = f"cpu_cores_count 96\nsimd_count {512 if integrated else 0}\n"
    nodes = [processor, *["cpu_cores_count 0\nsimd_count 1216\n"] * cards]
    for number, text in enumerate(nodes):
        folder = root / f"sys/class/kfd/kfd/topology/nodes/{number}"
        folder.mkdir(parents=True)
        (folder / "properties").write_text(text)
    return ["dev/kfd"]
