"""The bar of a long merge, and the free space that a merge checks first."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.small_models import Save

from btm_scale.checkpoint.merge import bar
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError


@pytest.fixture
def models(save: Save) -> list[tuple[Path, float]]:
    return [(save(name, {"a.weight": torch.full((1000,), value)}), 1.0) for name, value in (("a", 1.0), ("b", 2.0))]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_long_merge_shows_a_bar_with_its_rate_on_a_terminal(
    models: list[tuple[Path, float]],
    jobs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(bar, "SHOWN_AFTER", 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    merge(tmp_path / "out", models, jobs=jobs)
    shown = capsys.readouterr().err
    assert "merging" in shown
    assert "4.0/4.0 kB" in shown


@pytest.mark.parametrize("reason", ["short", "no terminal", "quiet"])
def test_there_is_no_bar(
    models: list[tuple[Path, float]],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING if reason == "quiet" else logging.INFO)
    monkeypatch.setattr(bar, "SHOWN_AFTER", 60.0 if reason == "short" else 0.0)
    monkeypatch.setenv("TTY_COMPATIBLE", "0" if reason == "no terminal" else "1")
    merge(tmp_path / "out", models)
    assert "merging" not in capsys.readouterr().err


def test_a_merge_for_which_there_is_no_space_writes_nothing(
    models: list[tuple[Path, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4000))
    with pytest.raises(CheckpointError, match=r"needs 0\.000 GB and its file system has 0\.000 GB free\. Nothing was"):
        merge(tmp_path / "out", models)
    assert not list(tmp_path.glob("out*"))
