"""Commands may run in an untrusted directory, whose Python files must not be imported."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path


def import_nothing_from_here() -> None:
    """Let the processes that this one starts import no module from the working directory.

    `python -m` and `python -c`, with which ranks, trials and workers are started, search it before everything else:
    a file json.py in a model directory would run. Does nothing if this process was itself started that way.
    """
    with contextlib.suppress(OSError):  # a working directory that was removed
        if sys.path and sys.path[0] not in ("", str(Path.cwd())):
            os.environ["PYTHONSAFEPATH"] = "1"
