"""Corpora for the data tests, if this machine has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpora() -> Path:
    """Eight real domains, if this machine has them."""
    beside = Path(__file__).parents[2].parent / "shared" / "corpora"
    path = Path(os.environ.get("BTM_CORPORA", beside))
    if not (path / "math.jsonl.gz").is_file():
        pytest.skip(f"no corpora at {path}; set BTM_CORPORA to their folder")
    return path
