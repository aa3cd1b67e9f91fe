"""Rows that are measured in their own processes and appended to a file as they finish."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(__file__).parent.parent / "gpu_day.py"
ROOT = SCRIPT.parent.parent
DONE, FAILED, TIMEOUT, UNAVAILABLE = "done", "failed", "timeout", "unavailable"
_RETRIED = (FAILED, TIMEOUT, UNAVAILABLE)
_LOG_LINES = 6


class UnavailableError(Exception):
    """The machine lacks what a row measures; the row is recorded, and the next one follows."""


@dataclass(frozen=True)
class Site:
    """Where the results go, and whether toy sizes on a CPU replace the GPU."""

    out: Path
    simulated: bool = False

    @property
    def device(self) -> str:
        """The device of the measurements."""
        return "cpu" if self.simulated else "cuda"

    def use_kernels(self) -> str:
        """Return the device, whose kernels Triton interprets on a CPU. Call it before anything imports Triton."""
        if self.simulated:
            os.environ["TRITON_INTERPRET"] = "1"
        return self.device

    def folder(self, name: str) -> Path:
        """Return a folder of the results, which is created if necessary."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class Row:
    """A measurement: `work` returns its figures, or raises; it is killed after `limit_s` seconds."""

    name: str
    limit_s: float
    work: Callable[[Site], dict[str, Any]]


class Ledger:
    """The rows that were measured. A line that a killed process left incomplete is dropped."""

    def __init__(self, path: Path, *, retry: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        complete = text[: text.rfind(b"\n") + 1]
        if complete != text:
            path.write_bytes(complete)
        self.rows: dict[str, dict[str, Any]] = {}
        for line in complete.splitlines():
            row = json.loads(line)
            self.rows[row["row"]] = row
        self._skipped = {name for name, row in self.rows.items() if not (retry and row["status"] in _RETRIED)}

    def has(self, row: Row) -> bool:
        """Return whether a row is measured, and is not to be measured again."""
        return row.name in self._skipped

    def append(self, entry: dict[str, Any]) -> None:
        """Write a row to the disk."""
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[entry["row"]] = entry
        self._skipped.add(entry["row"])


def measure(rows: Iterable[Row], ledger: Ledger, site: Site, budget: float) -> list[Row]:
    """Measure the missing rows whose time limits fit the budget in seconds; return those that are left."""
    began = time.monotonic()
    missing = [row for row in rows if not ledger.has(row)]
    if missing and "environment" not in ledger.rows:
        ledger.append({"row": "environment", "status": DONE, "seconds": 0.0, "figures": _environment()})
    left = []
    for row in missing:
        if time.monotonic() - began + row.limit_s > budget:
            left.append(row)
            continue
        entry = _measured(row, site)
        ledger.append(entry)
        print(f"{entry['seconds']:6.1f} s  {entry['status']:<11} {row.name}", flush=True)
    return left


def _environment() -> dict[str, Any]:
    """Return hardware and versions, from a process that ends: some GPUs serve one process at a time."""
    program = "import json; from environment import describe; print('\\n' + json.dumps(describe()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, stdout=subprocess.PIPE, check=True)
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


def run_row(row: Row, site: Site) -> None:
    """Measure a row in this process, and print its figures, or what is missing, as the last line."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        result = {"status": DONE, "figures": row.work(site)}
    except UnavailableError as error:
        result = {"status": UNAVAILABLE, "error": str(error)}
    print(f"\n{json.dumps(result)}", flush=True)


def _end_with_parent(parent: int) -> None:
    """End this process and its children when their parent is killed: they would disturb the next call."""
    while os.getppid() == parent:
        time.sleep(1)
    kill_tree(os.getpid())


def _measured(row: Row, site: Site) -> dict[str, Any]:
    """Measure a row in a process group, all of which is killed when its time is over."""
    log = site.folder("logs") / (re.sub(r"[^\w.-]+", "-", row.name) + ".log")
    command = [sys.executable, str(SCRIPT), "--row", row.name, "--out", str(site.out)]
    command += ["--simulate"] if site.simulated else []
    entry: dict[str, Any] = {"row": row.name, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(row.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_tree(process.pid)
            process.wait()
    entry["seconds"] = round(time.monotonic() - began, 1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # Libraries may print after the result, such as NCCL about a process group that was not destroyed.
    result = next((line for line in reversed(lines) if line.startswith('{"status": ')), None)
    if code == 0 and result is not None:
        return entry | json.loads(result)
    problem = f"took more than {row.limit_s:.0f} s" if code is None else f"exit code {code} without a result"
    return entry | {
        "status": TIMEOUT if code is None else FAILED,
        "error": "\n".join([problem, *lines[-_LOG_LINES:]]),
    }


def kill_tree(process: int) -> None:
    """End a process and its children, which may have separate process groups."""
    try:
        children = psutil.Process(process).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def variables(site: Site) -> dict[str, str]:
    """Return the environment variables of every row."""
    path = os.pathsep.join(filter(None, [str(SCRIPT.parent), os.environ.get("PYTHONPATH")]))
    common = {"TRITON_CACHE_DIR": str(site.folder("triton")), "PYTHONPATH": path}
    return common | ({"CUDA_VISIBLE_DEVICES": ""} if site.simulated else {})


def print_table(ledger: Ledger, rows: Iterable[Row]) -> None:
    """Print the rows that were measured, one line each."""
    measured = [ledger.rows[row.name] for row in rows if row.name in ledger.rows]
    counts = {status: sum(row["status"] == status for row in measured) for status in (DONE, *_RETRIED)}
    print()
    for row in measured:
        print(_line(row))
    print(f"{ledger.path}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))


def _line(entry: dict[str, Any]) -> str:
    if entry["status"] == DONE:
        figures = " ".join(f"{name}={_short(value)}" for name, value in entry["figures"].items())
    else:
        figures = f"{entry['status']}: {entry['error'].splitlines()[-1][:120]}"
    return f"{entry['seconds']:6.1f} s  {entry['row']}: {figures}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int | str | bool | None) else "..."
