"""The tests pass on a machine with a GPU, and leave it alone; `helpers/one_gpu` makes this machine look like one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_GPU = ROOT / "tests" / "helpers" / "one_gpu"
# What chooses devices in the test's process, in a rank, and in a rank of DeepSpeed's launcher.
TESTS = (
    "tests/util/test_devices.py",
    "tests/launch/test_local.py",
    "tests/run/test_devices_of_runs.py",
    "tests/train/test_checkpoint.py::test_all_ranks_resume_from_the_checkpoint_that_the_first_rank_finds",
    "tests/distributed/test_devices_of_ranks.py::test_ranks_of_deepspeeds_launcher_leave_hidden_gpus_alone",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on the machine with one GPU, whose environment chooses no device."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "BTM_SCALE_DEVICE")
    }
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
