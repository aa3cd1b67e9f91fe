"""A group that the local launcher starts, as forks of its process, so that nothing is imported again."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch


class ForkedGroup:
    """The Popen of `deepspeed.launcher.launch`; `run` is the command line, which every rank calls."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        stdout: Any,
        env: Mapping[str, str],
        run: Callable[[list[str]], object],
        **_: Any,
    ) -> None:
        self.returncode: int | None = None
        first = words.index("--module")
        options = dict(word.split("=", 1) for word in words[:first] if "=" in word)
        [places] = json.loads(base64.urlsafe_b64decode(options["--world_info"])).values()
        place = {"WORLD_SIZE": str(len(places)), "LOCAL_SIZE": str(len(places))}
        place |= {"MASTER_ADDR": options["--master_addr"], "MASTER_PORT": options["--master_port"]}
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(1, 2)
            os.environ.clear()
            os.environ.update({**env, **place})
            _launch(len(places), run, list(words[first + 2 :]))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        begin = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() > begin + timeout:
                raise subprocess.TimeoutExpired("a forked group", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def _launch(ranks: int, run: Callable[[list[str]], object], arguments: list[str]) -> NoReturn:
    """Become the only rank, or fork all and end when they have ended, or with the first that fails.

    `end_all` then ends the others, which are in the session of this process.
    """
    if ranks == 1:
        _become(0, run, arguments)
    for rank in range(ranks):
        if os.fork() == 0:
            _become(rank, run, arguments)
    code = 0
    for _ in range(ranks):
        code = os.waitstatus_to_exitcode(os.wait()[1])
        if code:
            break
    os._exit(code if code >= 0 else 1)


def _become(rank: int, run: Callable[[list[str]], object], arguments: list[str]) -> NoReturn:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a new process would read it
    end_with(lambda: run(arguments))


def end_with(job: Callable[[], object]) -> NoReturn:
    """Run a job and end this process as an interpreter would, without what pytest or torch registered."""
    code: Any = 0
    try:
        job()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
