"""The command's help texts, as a user sees them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

_FRAME = re.compile("[│╭╮╰╯─┃━]")  # around the panels of a rich terminal
_ENTRY = re.compile(r"^ {1,6}([a-z][a-z-]+)(?:  +\S.*)?$", re.MULTILINE)
_FAMILIES = ("forest",)  # verbs that have verbs below them


@cache
def help_texts() -> dict[str, str]:
    """The output of `--help` by verb: "" for the command itself, "merge", "forest add" and so on."""
    with ThreadPoolExecutor(2) as pool:
        top = _help("")
        verbs = _verbs(top)
        texts = {"": top, **dict(zip(verbs, pool.map(_help, verbs), strict=True))}
        below = [f"{family} {verb}" for family in _FAMILIES for verb in _verbs(texts[family])]
        return texts | dict(zip(below, pool.map(_help, below), strict=True))


def options_of(verb: str) -> set[str]:
    """The options that a verb's help names, such as `--json`."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_texts()[verb]))


def _verbs(text: str) -> list[str]:
    return sorted(set(_ENTRY.findall(text)))


def _help(verb: str) -> str:
    command = [sys.executable, "-m", "btm_scale.cli", *verb.split(), "--help"]
    environment = os.environ | {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return _FRAME.sub(" ", done.stdout)
