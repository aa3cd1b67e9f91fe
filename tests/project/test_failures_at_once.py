"""A failure is printed before the next test ends, so that a run that is cut short has shown it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CASES = """
import time

def test_that_fails():
    assert 1 + 1 == 3, "one and one"

def test_that_never_ends():
    time.sleep(60)
"""


@pytest.mark.parametrize("options", [[], ["-n", "1", "--dist", "loadfile"]], ids=["one process", "xdist"])
def test_a_failure_is_printed_while_the_next_test_still_runs(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", *options, str(tmp_path)]
    environment = {"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "AssertionError: one and one" in line:
                break
        alive = process.poll() is None
        process.terminate()
    assert alive, printed
    assert "test_that_fails (call)" in printed
