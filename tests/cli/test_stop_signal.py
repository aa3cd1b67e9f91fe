"""SIGUSR1 ends a command with a message and the code that asks for a restart, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.launch.local import LocalPool
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.launch.supervise import run_groups_in
from btm_scale.run.preparing import prepare_run
from btm_scale.run_dir import RunDir
from btm_scale.util import stop_signal

# The command, in a process that gets the signal when it imports a module for the first time.
WHEN_IMPORTED = """
import os, signal, sys
module = sys.argv.pop()

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Sender())
from btm_scale.cli.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["btm_scale.cli.app", "pydantic"])
def test_a_command_that_still_imports_leaves_when_asked(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WHEN_IMPORTED, "prepare", "run.yaml", module],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (REQUEUE, "btm-scale: asked to stop; rerun the same command to resume\n")


@pytest.fixture
def swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that came while a library was imported that catches every exception."""
    monkeypatch.setattr(stop_signal, "_is_requested", False)
    before = signal.getsignal(signal.SIGUSR1)
    stop_signal.leave_on_signal()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("no exit")
    except SystemExit:
        pass
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_request_that_an_import_has_swallowed_is_heard_when_work_begins(swallowed: None, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path, layout={"precision": "fp32"}))
    with pytest.raises(SystemExit) as left:
        prepare_run(config, RunDir(tmp_path / "run"))
    assert left.value.code == REQUEUE
    with pytest.raises(SystemExit) as left:
        run_groups_in(LocalPool(1, 1, "cpu"), [])
    assert left.value.code == REQUEUE
