"""Query the child process, which may hang or crash, and start another for the remaining checks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from btm_scale.run.doctor.finding import State
from btm_scale.util.mpi import without_mpi

SECONDS = 90.0  # for all checks: importing libraries from a cold network file system takes a minute

# Dependencies: a check is skipped if the one that it needs has failed.
_NEEDS = {
    "gpus": "torch",
    "deepspeed": "torch",
    "precision": "deepspeed",
    "megatron.core": "torch",
}


@dataclass(frozen=True)
class Reply:
    """The answer of a check, or the reason why there is none."""

    answer: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    is_asked: bool = True

    @property
    def state(self) -> State:
        """The state of the finding from this reply."""
        return "ok" if not self.error else "broken" if self.is_asked else "unchecked"


def ask(names: Sequence[str], seconds: float = SECONDS) -> dict[str, Reply]:
    """Run the named checks in this order. A child that dies is replaced; after `seconds`, the rest is unchecked."""
    replies: dict[str, Reply] = {}
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="btm-scale-doctor-") as folder:
        while True:
            for name in names:
                needed = _NEEDS.get(name, "")
                if name not in replies and needed in replies and replies[needed].error:
                    replies[name] = Reply(error=f"{needed} does not work", is_asked=False)
            left = [name for name in names if name not in replies]
            if not left:
                return replies
            if time.monotonic() >= deadline:
                return replies | dict.fromkeys(left, Reply(error=f"not checked within {seconds:.0f} s", is_asked=False))
            replies |= _ask_once(left, Path(folder), deadline)


def _ask_once(names: Sequence[str], folder: Path, deadline: float) -> dict[str, Reply]:
    """Return the replies of one child, at least the one to the first name."""
    answers, log = folder / "answers", folder / "log"
    answers.write_text("")
    command = [sys.executable, "-m", "btm_scale.run.doctor.child", str(answers), *names]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            env=without_mpi(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that its own children are killed with it
        )
        try:
            end = _death(child.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            end = "no answer in time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)  # a process blocked in a GPU driver cannot be killed
    replies, begun = {}, names[0]
    for line in answers.read_text().splitlines():
        try:
            read = json.loads(line)
        except ValueError:  # killed while it wrote
            continue
        begun = read.get("begin", begun)
        if "name" in read:
            replies[read["name"]] = Reply(read.get("answer", {}), read.get("error", ""))
    if begun not in replies:
        printed = log.read_text(errors="replace").strip().splitlines()
        replies[begun] = Reply(error=": ".join([end, *printed[-1:]])[:400])
    return replies


def _death(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        return f"the process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"the process was killed by signal {-code}"
