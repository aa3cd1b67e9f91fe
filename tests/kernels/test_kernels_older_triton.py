"""Compile and launch under the oldest Triton that pyproject.toml allows, which PyTorch 2.11 brings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.cuts import full

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
VERSION = re.search(r"^OLDER_TRITON := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
# `make older-triton` puts it beside the environment's packages, of which one is the pinned Triton.
OLDER = Path(os.environ.get("BTM_SCALE_OLDER_TRITON", f"{sys.prefix}/triton-{VERSION}"))


def oldest_allowed() -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return extras["kernels"][0].removeprefix("triton>=")


def python_with_older_triton(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert OLDER.is_dir(), f"{OLDER} does not exist. It holds an older Triton: run `make older-triton`."
    environment = {**os.environ, "PYTHONPATH": str(OLDER), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_older_triton_is_the_oldest_that_is_allowed():
    version = python_with_older_triton("-c", "import triton; print(triton.__version__)").stdout.strip()
    assert version == VERSION
    assert version.startswith(f"{oldest_allowed()}.")


@pytest.mark.parametrize(
    ("marks", "words"),
    [
        pytest.param(
            "not full",
            "every_launch or few-sm_90 or few-sm_100 or few-gfx942-16 or layers-sm_90 or (of_the_loss and sm_90)",
            id="some",
        ),
        full("full or not full", "", id="all"),
    ],
)
def test_kernels_compile_without_spills_and_launch_under_the_older_triton(marks, words):
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    files = [str(HERE / name) for name in ("test_kernels_launches.py", "test_kernels_compiled.py")]
    done = python_with_older_triton("-m", "pytest", *options, "-m", marks, "-k", words, *files)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_reason_why_its_interpreter_cannot_run_names_both_versions():
    program = "from btm_scale.kernels.hardware import interpreter_problem; print(interpreter_problem())"
    reason = python_with_older_triton("-c", program).stdout
    assert re.match(r"The interpreter of Triton 3\.6\.\d+ does not run on NumPy 2\.\d+\.\d+: ", reason)
    assert "Install triton>=3.7 or numpy<2.4." in reason
    for script in ("kernels.py", "tune_kernels.py"):
        done = python_with_older_triton(f"benchmarks/{script}", "--small")
        assert done.returncode == 1
        assert reason.strip() in done.stderr
