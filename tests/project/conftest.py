"""Modules of benchmarks/, which is no package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a benchmark by the name of its file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
