"""A rank that receives a stop signal while there is nothing to save."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from btm_scale.launch.shutdown import REQUEUE

SCORING = """
import os, signal, sys, time
from pathlib import Path
from btm_scale.train.preemption import leaving_at_once
with leaving_at_once(Path(sys.argv[1])):
    os.kill(os.getpid(), int(sys.argv[2]))
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "code", "stopped"), [(signal.SIGUSR1, REQUEUE, True), (signal.SIGTERM, -signal.SIGTERM, False)]
)
def test_scoring_requests_a_restart_on_sigusr1_but_not_on_sigterm(
    number: signal.Signals, code: int, stopped: bool, tmp_path: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", SCORING, str(tmp_path), str(int(number))], timeout=120)
    assert done.returncode == code
    assert (tmp_path / "stopped").exists() is stopped
