"""What tests of `btm-scale mixture` share: a run that they may change, and losses by a known law."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.mixtures import MeasuredHere

from btm_scale.config.run import RunConfig
from btm_scale.run_dir import RunDir


@pytest.fixture
def run(handmade: tuple[RunConfig, RunDir], tmp_path: Path) -> RunDir:
    """A copy of the finished run."""
    copy = RunDir(tmp_path / "run")
    shutil.copytree(handmade[1].root, copy.root, ignore=shutil.ignore_patterns("mixture.json"))
    return copy


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> MeasuredHere:
    """The losses, and which mixtures they were asked for."""
    return MeasuredHere(monkeypatch)
