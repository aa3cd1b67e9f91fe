"""A rank that receives a stop signal while there is nothing to save."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.forked_commands import ended, forked

from btm_scale.launch.shutdown import REQUEUE
from btm_scale.train.preemption import leaving_at_once
from btm_scale.util import stop_signal


@pytest.mark.parametrize(
    ("number", "code", "stopped"), [(signal.SIGUSR1, REQUEUE, True), (signal.SIGTERM, -signal.SIGTERM, False)]
)
def test_scoring_requests_a_restart_on_sigusr1_but_not_on_sigterm(
    number: signal.Signals, code: int, stopped: bool, tmp_path: Path
) -> None:
    def score() -> int:
        try:
            with leaving_at_once(tmp_path):
                os.kill(os.getpid(), number)
                time.sleep(60)
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    assert ended(forked(score, tmp_path / "output")) == code
    assert (tmp_path / "stopped").exists() is stopped


def test_scoring_does_not_begin_if_an_import_ignored_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_signal, "_is_requested", True)
    with pytest.raises(SystemExit) as left, leaving_at_once(tmp_path):
        raise AssertionError("it began")
    assert left.value.code == REQUEUE
