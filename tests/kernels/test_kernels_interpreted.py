"""Runs the cases of `interpreted/` where Triton's interpreter is on from the first import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
numpy = pytest.importorskip("numpy", reason="Triton's interpreter computes with NumPy")
HERE = Path(__file__).parent


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4),
    reason="the interpreter of Triton 3.6 cannot take a loop bound from an array of NumPy 2.4",
)
@pytest.mark.parametrize("cases", sorted(path.name for path in (HERE / "interpreted").glob("test_*.py")))
def test_triton_kernels_agree_with_float64_under_the_interpreter(cases):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore"]
    finished = subprocess.run(
        [*command, str(HERE / "interpreted" / cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
