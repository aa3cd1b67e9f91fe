"""What the tests of durability share: a tiny run at every stage."""

from __future__ import annotations

import pytest
from helpers.verb_cases import Stages
from helpers.warm import Warm


@pytest.fixture(scope="session")
def stages(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("stages"), warm)
