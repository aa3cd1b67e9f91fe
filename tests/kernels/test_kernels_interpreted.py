"""Run the tests in `interpreted/` in a process whose Triton is imported with the interpreter enabled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cuts import full

from btm_scale.kernels.hardware import interpreter_problem

HERE = Path(__file__).parent


@pytest.mark.skipif(interpreter_problem() is not None, reason=str(interpreter_problem()))
@pytest.mark.parametrize("cases", sorted(path.name for path in (HERE / "interpreted").glob("test_*.py")))
@pytest.mark.parametrize("selected", ["not full", full("full")])
def test_triton_kernels_agree_with_float64_under_the_interpreter(cases, selected):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore"]
    finished = subprocess.run(
        [*command, "-m", selected, str(HERE / "interpreted" / cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
