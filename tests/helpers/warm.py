"""Commands and scripts in forks of a process that has imported everything: each takes as long as its work.

`python -m helpers.warm` is that process. It forks once per request, so a test can really kill a command at any moment,
many times per second. Ranks, which the local launcher would start as new processes, are forks too. Tests of processes
and of launchers start real ones: `btm_scale` and `start_btm_scale` of helpers/tiny_run.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

TESTS = Path(__file__).parents[1]
_LONGEST_SECONDS = 900
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
    "btm_scale.evaluate.mixture",
    "btm_scale.report.mixture_table",
    "btm_scale.run.mixture_cost",
    "btm_scale.model.hf_decoder",
    "deepspeed.launcher.launch",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron.core.datasets.indexed_dataset",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.gpt",
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
    """Runs commands and scripts one at a time, in the environment and folder of the caller."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self._output, self._messages = folder / "stdout", folder / "stderr"
        self._environment = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.warm"],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._own_environment(),
        )
        assert self._answer() == "ready"

    def run(self, *arguments: object, wrap: Sequence[Any] = (), kill_after: float | None = None) -> Done:
        """Run a command, and kill it after some seconds if it has not ended before.

        `wrap` names a context manager of helpers that surrounds the command.
        """
        words = [str(word) for word in arguments]
        return self._run({"arguments": words, "wrap": list(wrap), "environment": self._own_environment()}, kill_after)

    def run_script(self, script: Path, *arguments: object, environment: Mapping[str, str]) -> Done:
        """Run a Python script with more variables in its environment."""
        words = [str(script), *map(str, arguments)]
        return self._run({"script": words, "environment": self._own_environment() | environment})

    def _run(self, request: dict[str, Any], kill_after: float | None = None) -> Done:
        begin = time.monotonic()
        request |= {"stdout": str(self._output), "stderr": str(self._messages), "folder": str(Path.cwd())}
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        pid = int(self._answer())
        if kill_after is not None:
            time.sleep(kill_after)
            self._kill(pid)
        print("reap", file=self._process.stdin, flush=True)
        if not select.select([self._process.stdout], [], [], _LONGEST_SECONDS)[0]:
            self._kill(pid)
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

    def _own_environment(self) -> dict[str, str]:
        # A command that ran in this process may have set the last, with which `python -m helpers.warm` is not found.
        absent = ("RANK", "WORLD_SIZE", "PYTHONSAFEPATH")
        return {name: value for name, value in os.environ.items() if name not in absent} | self._environment

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


@functools.cache
def warm_process() -> Warm:
    """Return the `Warm` of this test process, which the first call starts."""
    folder = tempfile.TemporaryDirectory(prefix="btm-scale-warm-")
    warm = Warm(Path(folder.name))

    @atexit.register
    def end() -> None:
        warm.close()
        folder.cleanup()

    return warm


def _serve() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks do not look at what is imported when they collect garbage
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
    from helpers.forked_group import ForkedGroup, end_with  # a worker that is spawned imports this module, not torch

    for descriptor, path in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY, 0o644)
        os.dup2(opened, descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if "script" in request:
        sys.argv = request["script"]
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        end_with(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    from btm_scale.launch import supervise

    names: dict[str, Any] = {name: getattr(subprocess, name) for name in ("DEVNULL", "STDOUT", "TimeoutExpired")}
    names["Popen"] = functools.partial(ForkedGroup, run=_command)
    supervise.subprocess = SimpleNamespace(**names)  # type: ignore[assignment]
    end_with(lambda: _command(request["arguments"], request["wrap"]))


def _command(arguments: list[str], wrap: Sequence[Any] = ()) -> None:
    from btm_scale.cli.app import main

    with contextlib.ExitStack() as stack:
        if wrap:
            module, name = wrap[0].split(":")
            stack.enter_context(getattr(importlib.import_module(module), name)(*wrap[1:]))
        main(arguments)


if __name__ == "__main__":
    _serve()
