"""A machine with one GPU, for the tests that must not use it: PYTHONPATH=$PWD/tests/helpers/one_gpu make test.

Python imports this file when it starts, also in every child process. PyTorch and NVML then report one GPU unless
CUDA_VISIBLE_DEVICES hides it, and its device node and nvidia-smi exist. Whatever computes on it fails, as PyTorch has
no driver here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_HERE = Path(__file__).parent
_NAME = "NVIDIA H100 80GB HBM3"


def _visible() -> int:
    """Return the number of GPUs that the environment lets this process see."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return int(chosen == "0" or chosen.startswith("GPU-"))


def _give_a_gpu(torch: ModuleType) -> None:
    def device_name(device: Any = None) -> str:
        assert _visible()
        return _NAME

    torch.cuda.is_available = lambda: _visible() > 0
    torch.cuda.device_count = _visible
    torch.cuda._device_count_nvml = torch.cuda._raw_device_count_nvml = _visible
    torch.cuda.get_device_name = device_name
    torch.version.cuda = torch.version.cuda or "12.8"


def _give_a_node(devices: ModuleType) -> None:
    devices._ROOT = _HERE / "root"


sys.path.insert(0, str(_HERE.parents[1]))
from helpers.changed_imports import change_when_imported  # noqa: E402

sys.path.remove(str(_HERE.parents[1]))
change_when_imported({"torch": _give_a_gpu, "btm_scale.util.devices": _give_a_node})
os.environ["PATH"] = f"{_HERE / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
