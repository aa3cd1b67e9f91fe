"""The command's help texts, as a user sees them."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache

import pytest

from btm_scale.cli.app import main

_FRAME = re.compile("[│╭╮╰╯─┃━]")  # around the panels of a rich terminal
_ENTRY = re.compile(r"^ {1,6}([a-z][a-z-]+)(?:  +\S.*)?$", re.MULTILINE)
_FAMILIES = ("forest",)  # verbs that have verbs below them


@cache
def help_texts() -> dict[str, str]:
    """The output of `--help` by verb: "" for the command itself, "merge", "forest add" and so on."""
    top = _help("")
    texts = {"": top, **{verb: _help(verb) for verb in _verbs(top)}}
    below = [f"{family} {verb}" for family in _FAMILIES for verb in _verbs(texts[family])]
    return texts | {verb: _help(verb) for verb in below}


def options_of(verb: str) -> set[str]:
    """The options that a verb's help names, such as `--json`."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_texts()[verb]))


def _verbs(text: str) -> list[str]:
    return sorted(set(_ENTRY.findall(text)))


def _help(verb: str) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        for name, value in {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"}.items():
            patch.setenv(name, value)
        patch.delenv("FORCE_COLOR", raising=False)
        main([*verb.split(), "--help"])
    return _FRAME.sub(" ", text.getvalue())
