"""A rank that is asked to stop while there is nothing to save."""

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
def test_a_rank_that_scores_asks_for_another_job_when_its_time_is_over_and_not_when_it_is_ended(
    number: signal.Signals, code: int, stopped: bool, tmp_path: Path
) -> None:
    done = subprocess.run([sys.executable, "-c", SCORING, str(tmp_path), str(int(number))], timeout=120)
    assert done.returncode == code
    assert (tmp_path / "stopped").exists() is stopped
