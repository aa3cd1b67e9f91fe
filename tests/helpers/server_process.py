"""A server of a tiny forest in its own process, with its own memory: `python -m helpers.server_process FOLDER`."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from btm_scale.serve.server import bind, make_server, url_of
from helpers.served_forest import planner_of
from helpers.tiny_forest import write_experts


@dataclass
class ServerProcess:
    """A running server and what it has written to standard error."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def memory(self) -> int:
        """Return the bytes of memory that the server uses."""
        resident: int = psutil.Process(self.process.pid).memory_info().rss
        return resident

    def idle(self) -> bool:
        """Whether every slot becomes free in time."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            lines = httpx2.get(f"{self.url}/metrics", timeout=60).text.splitlines()
            loads = [float(line.split()[-1]) for line in lines if line.startswith("btm_scale_load{")]
            if loads == [0, 0]:
                return True
            time.sleep(0.01)
        return False


@contextlib.contextmanager
def server_process(folder: Path) -> Iterator[ServerProcess]:
    """Serve a new forest of two experts, written to `folder`, for a while."""
    log = folder / "log"
    command = [sys.executable, "-m", "helpers.server_process", str(folder)]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child,
    ):
        try:
            assert child.stdout is not None
            # Libraries print to standard output too.
            url = next((line.strip() for line in child.stdout if line.startswith("http")), None)
            assert url is not None, log.read_text()
            while httpx2.get(f"{url}/health", timeout=60).status_code != 200:
                time.sleep(0.01)
            yield ServerProcess(url, child, log)
        finally:
            child.terminate()


def _serve(folder: Path) -> None:
    experts = write_experts(folder)
    planner, backend = planner_of({**experts, "seed": experts["expert0"]}, max_rows=16, max_waiting=40)
    listener = bind("127.0.0.1", 0)
    server, failures = make_server(planner, backend)
    print(url_of(listener), flush=True)
    asyncio.run(server.serve(sockets=[listener]))
    assert failures == []


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
