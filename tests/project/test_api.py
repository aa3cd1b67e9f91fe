"""docs/api.md lists what a program may import: every name is there, and every module that moved has arrived."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
NAMES = re.findall(r"^\| `(\w+)` \| `(btm_scale[\w.]*)` \| .+ \|$", PAGE, re.MULTILINE)
MOVES = re.findall(r"^\| `(btm_scale[\w.]*)` \| `(btm_scale[\w.]*)` \|$", PAGE, re.MULTILINE)


def test_the_page_is_read() -> None:
    assert len(NAMES) > 40
    assert len(MOVES) > 50
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(NAMES) + len(MOVES) == len(rows), "a row of a table has another form"


@pytest.mark.parametrize(("name", "module"), NAMES, ids=lambda value: value)
def test_a_public_name_is_where_the_page_says_and_has_a_docstring(name: str, module: str) -> None:
    value = getattr(importlib.import_module(module), name)
    assert not callable(value) or value.__doc__


def test_every_module_that_moved_is_where_the_page_says() -> None:
    assert [now for _, now in MOVES if importlib.util.find_spec(now) is None] == []
