"""What the tests of durability share: a warm process that forks commands, and a tiny run at every stage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.verb_cases import Stages
from helpers.warm import Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    warm = Warm(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def stages(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("stages"), warm)
