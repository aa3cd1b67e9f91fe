"""The result of one check, and what the checks share: guards, and programs that are run with a time limit."""

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

_SECONDS = 5.0  # that a program may take to answer


@dataclass(frozen=True)
class Finding:
    """One line of the report: what is there, or what is missing and what it is needed for.

    `low` works within limits. The others do not work; `unchecked` is what another failure kept from being checked.
    """

    part: str
    name: str
    state: State
    found: str = ""
    needed_for: str = ""
    remedy: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether what needs this can run."""
        return self.state in ("ok", "low")


@dataclass(frozen=True)
class Ran:
    """What a program printed, and its exit code; None if it did not start or did not answer in time."""

    code: int | None
    output: str

    @property
    def lines(self) -> list[str]:
        """The lines that are not empty; one that says so if there are none."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines or [f"nothing printed, exit code {self.code}"]


def run_program(*command: str) -> Ran:
    """Run a program for what it prints on stdout and stderr. Never raises."""
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
    """The path of the first of these programs that exists: in this environment, as the launchers look, or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def guarded(part: str, name: str, check: Callable[[], Finding | Sequence[Finding]]) -> list[Finding]:
    """The findings of a check, or, if it raises, one that says so: a report must not end with a traceback."""
    try:
        found = check()
        return [found] if isinstance(found, Finding) else list(found)
    except Exception as error:
        return [Finding(part, name, "broken", f"cannot be checked: {described(error)}")]


def described(error: BaseException) -> str:
    """The type of an error and the first two lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:2]])[:300]


def size(number: float) -> str:
    """Bytes for a person."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"
