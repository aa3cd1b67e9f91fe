"""Hardware, versions and date of a measurement, which every benchmark's JSON has."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "btm-scale",
    "torch",
    "deepspeed",
    "megatron-core",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "pyarrow",
    "triton",
    "cut-cross-entropy",
    "liger-kernel",
)


Environment = Mapping[str, Any]


def environments_of(document: Mapping[str, Any]) -> list[Environment]:
    """Return those in which the units of a result were measured, or that of a result without units."""
    units = document.get("units", {}).values()
    return [unit["environment"] for unit in units if "environment" in unit] or [document["environment"]]


def measured_on(environments: Sequence[Environment]) -> str:
    """Return the hardware and the first and last date of some measurements."""
    machines = [f"{one['hardware']['cpu']}, {one['hardware']['cores']} cores" for one in environments]
    days = sorted(one["date"][:10] for one in environments)
    return f"{' and '.join(dict.fromkeys(machines))}, {' to '.join(dict.fromkeys((days[0], days[-1])))}"


def describe() -> dict[str, Any]:
    """Hardware, versions and date (UTC); `load_average` is the load before the measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": psutil.virtual_memory().total,
            "accelerators": _accelerators(),
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), "system": platform.platform()} | _versions(),
    }


def of_installed() -> dict[str, str]:
    """Return the environment variables of a process that is timed from its start.

    An installed package has its bytecode. A checkout writes it at the first import, unless a variable forbids it.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    installed = {
        distribution.metadata["Name"].lower(): distribution for distribution in importlib.metadata.distributions()
    }
    return {name: installed[name].version for name in PACKAGES if name in installed}


def _accelerators() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
