"""Verbs in the test's own process, for tests that need neither a new interpreter nor its seconds of imports."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from typing import Any

import pytest

from helpers.forked_commands import call


def answer(*arguments: object) -> Any:
    """Return what a verb prints under --json; the verb must succeed."""
    return json.loads(_printed(0, *arguments, "--json")[0])


def refusal(*arguments: object) -> str:
    """Return the message of a verb that must end with exit code 2."""
    return _printed(2, *arguments)[1]


def _printed(expected: int, *arguments: object) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("btm_scale")
    handlers, level = logger.handlers[:], logger.level
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        code = call(*arguments)
    logger.handlers[:] = handlers
    logger.setLevel(level)
    assert code == expected, f"{arguments} exited with {code}:\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()
