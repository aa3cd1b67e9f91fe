"""The command line in forks of a process that has imported everything: a command takes as long as its work.

`python -m helpers.warm` is that process. It forks once per request, so a test can really kill a command at any moment,
many times per second. Ranks, which the local launcher would start as new processes, are forks too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

TESTS = Path(__file__).parents[1]
_IMPORTED = (
    "btm_scale.cli.app",
    "btm_scale.run.worker",
    "btm_scale.run.pipeline",
    "btm_scale.run.grow",
    "btm_scale.run.status",
    "btm_scale.run.plan",
    "btm_scale.report.page",
    "btm_scale.report.sections",
    "btm_scale.report.results_table",
    "btm_scale.report.plan_table",
    "btm_scale.forest.membership",
    "btm_scale.checkpoint.convert",
    "btm_scale.data.discover",
    "btm_scale.data.encode",
    "btm_scale.evaluate.ablate",
    "btm_scale.model.hf_decoder",
    "deepspeed.launcher.launch",
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.datasets.gpt_dataset",
    "plotly.graph_objs._scatter",
    "plotly.offline",
    "plotly.io.json",
    "jinja2",
    "rich.live",
    "sklearn.cluster",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "helpers.recorded_disk",
    "helpers.broken_disk",
)


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (negative: the signal), its output and its messages."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Warm:
    """Runs commands one at a time. `wrap` names a context manager of helpers that surrounds a command."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._output, self._messages = folder / "stdout", folder / "stderr"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.warm"],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **{name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
        )
        assert self._answer() == "ready"

    def run(self, *arguments: object, wrap: Sequence[Any] = (), kill_after: float | None = None) -> Done:
        """Run a command, and kill it after some seconds if it has not ended before."""
        begin = time.monotonic()
        request = {"arguments": [str(word) for word in arguments], "wrap": list(wrap)}
        request |= {"stdout": str(self._output), "stderr": str(self._messages)}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        pid = int(self._answer())
        if kill_after is not None:
            time.sleep(kill_after)
            self._kill(pid)
        print("reap", file=self._process.stdin, flush=True)
        code = os.waitstatus_to_exitcode(int(self._answer()))
        seconds = time.monotonic() - begin
        return Done(code, self._output.read_text(), self._messages.read_text(errors="replace"), seconds)

    def check(self, *arguments: object, wrap: Sequence[Any] = ()) -> Done:
        """Run a command that must succeed."""
        done = self.run(*arguments, wrap=wrap)
        assert done.code == 0, f"{arguments} exited with {done.code}:\n{done.stdout}\n{done.stderr}"
        return done

    def close(self) -> None:
        """End the warm process."""
        self._process.kill()
        self._process.wait()

    def _kill(self, pid: int) -> None:
        """Kill a command, and wait until its workers and ranks, which notice it, have ended too."""
        below: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            below = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGKILL)  # it stays a zombie until the warm process has answered: no other has its id
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive, f"{alive} outlived the command that started them"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(request)
        print(child, file=answers, flush=True)
        sys.stdin.readline()  # until then the child keeps its process id, even if it ends before it is killed
        _, status = os.waitpid(child, 0)
        print(status, file=answers, flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY, 0o644)
        os.dup2(opened, descriptor)
    from btm_scale.launch import supervise

    names = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    supervise.subprocess = SimpleNamespace(Popen=_ForkedRank, **names)  # type: ignore[assignment]
    _end_with_main(request["arguments"], request["wrap"])


def _end_with_main(arguments: list[str], wrap: Sequence[Any] = ()) -> NoReturn:
    """Run the command line in this process and end as an interpreter would, without what pytest or torch registered."""
    from btm_scale.cli.app import main

    code: Any = 0
    try:
        with contextlib.ExitStack() as stack:
            if wrap:
                module, name = wrap[0].split(":")
                stack.enter_context(getattr(importlib.import_module(module), name)(*wrap[1:]))
            main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


class _ForkedRank:
    """The Popen of a group of one rank."""

    def __init__(self, words: Sequence[str], *, stdout: Any, env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        [port] = [word.partition("=")[2] for word in words if word.startswith("--master_port=")]
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(1, 2)
            os.environ.clear()
            place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
            os.environ.update(env | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            _end_with_main(list(words[words.index("btm_scale.cli") + 1 :]))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


if __name__ == "__main__":
    _serve()
