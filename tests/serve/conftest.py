"""A served forest of two experts with a vocabulary of five tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.served_forest import Served, planner_of, running
from helpers.tiny_forest import write_experts


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_experts(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="session")
def served(experts: dict[str, Path]) -> Iterator[Served]:
    """Two experts and a model `seed`; prompts are of the letters a to d."""
    planner, backend = planner_of({**experts, "seed": experts["expert0"]}, max_rows=16, max_waiting=40)
    with running(planner, backend) as server:
        yield server
