"""The result of a check, and helpers for checks: guards, and programs with a time limit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "low", "old", "missing", "broken", "unchecked"]

_SECONDS = 5.0  # time limit of a program


@dataclass(frozen=True)
class Finding:
    """One line of the report: what exists, or what is missing and needed for what.

    State `low` works within limits. States other than `ok` and `low` do not work; `unchecked` could not be checked
    because of another failure.
    """

    part: str
    name: str
    state: State
    found: str = ""
    needed_for: str = ""
    remedy: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether features that need this work."""
        return self.state in ("ok", "low")


@dataclass(frozen=True)
class Ran:
    """The output of a program and its exit code, None if it did not start or timed out."""

    code: int | None
    output: str

    @property
    def lines(self) -> list[str]:
        """The non-empty lines, or one line that says that there are none."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines or [f"nothing printed, exit code {self.code}"]


def run_program(*command: str) -> Ran:
    """Run a program and return its stdout and stderr. Never raises."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Ran(None, f"no answer within {_SECONDS:.0f} s")
    except OSError as error:
        return Ran(None, str(error))
    return Ran(done.returncode, done.stdout.decode(errors="replace"))


def program(*names: str) -> str | None:
    """Return the path of the first of these programs that is in this environment or on PATH, as launchers search."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((location for name in names if (location := shutil.which(name, path=path))), None)


def guarded(part: str, name: str, check: Callable[[], Finding | Sequence[Finding]]) -> list[Finding]:
    """Return the findings of a check, or one `broken` finding if it raises: a report must not end with a traceback."""
    try:
        result = check()
        return [result] if isinstance(result, Finding) else list(result)
    except Exception as error:
        return [Finding(part, name, "broken", f"cannot be checked: {described(error)}")]


def described(error: BaseException) -> str:
    """Return the type of an error and the first two lines of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:2]])[:300]


def size(number: float) -> str:
    """Format a number of bytes."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"
