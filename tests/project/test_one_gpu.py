"""The tests pass on a machine with a GPU, and leave it alone; `helpers/one_gpu` makes this machine look like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from btm_scale.util.device_query import VISIBLE
from btm_scale.util.devices import DEVICE

ROOT = Path(__file__).parents[2]
ONE_GPU = ROOT / "tests" / "helpers" / "one_gpu"
# What chooses devices in the test's process, and in a rank of DeepSpeed's launcher.
TESTS = (
    "tests/util/test_devices.py",
    "tests/launch/test_local.py",
    "tests/run/test_devices_of_runs.py",
    "tests/distributed/test_devices_of_ranks.py::test_ranks_of_deepspeeds_launcher_leave_hidden_gpus_alone",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the machine with one GPU, whose environment chooses no device."""
    # A command that ran in this process may have chosen the CPU for its children.
    chosen = (*VISIBLE, DEVICE, "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    path = os.pathsep.join(filter(None, [str(ONE_GPU), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**kept, "PYTHONPATH": path, **environment}, capture_output=True, text=True
    )


@pytest.mark.parametrize(("hidden", "expected"), [({}, "True 1 ('0',)"), ({"CUDA_VISIBLE_DEVICES": ""}, "False 0 ()")])
def test_the_gpu_is_seen_unless_it_is_hidden(hidden: dict[str, str], expected: str) -> None:
    done = run(
        "-c",
        "import torch\n"
        "from btm_scale.util.devices import usable_gpus\n"
        "print(torch.cuda.is_available(), torch.cuda.device_count(), usable_gpus('auto', in_this_process=True).names)",
        **hidden,
    )
    assert done.stdout.strip() == expected, done.stderr


def test_tests_that_choose_devices_pass_on_a_machine_with_a_gpu() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not full", *TESTS)
    assert done.returncode == 0, done.stdout[-5000:]
