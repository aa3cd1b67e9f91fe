"""No Python file of the working directory runs in the processes that a command starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from btm_scale.cli.app import main

ROOT = Path(__file__).parents[2]


def child_sings(folder: Path) -> bool:
    """Whether a child that is started as ranks, trials and workers are imports a module of its working directory."""
    (folder / "json.py").write_text("print('sung')\n")
    done = subprocess.run([sys.executable, "-m", "json"], cwd=folder, env=os.environ, capture_output=True, text=True)
    return "sung" in done.stdout


def test_children_of_a_command_import_nothing_from_a_strangers_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    assert child_sings(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/opt/venv/bin", *sys.path])
    monkeypatch.setattr(sys, "argv", ["btm-scale", "--version"])
    main()
    assert not child_sings(tmp_path)


@pytest.mark.parametrize("first", ["", None])
def test_a_command_that_itself_runs_from_the_working_directory_keeps_it(
    first: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if first is None else first, *sys.path])
    monkeypatch.setattr(sys, "argv", ["btm-scale", "--version"])
    main()
    assert os.environ["PYTHONSAFEPATH"] == ""


def test_jobs_import_nothing_from_the_folder_they_were_submitted_in() -> None:
    steps = (ROOT / "launch" / "templates" / "steps.sh").read_text()
    assert "export PYTHONSAFEPATH=1" in steps
    for script in ("prepare", "train", "evaluate"):
        text = (ROOT / "launch" / "templates" / f"{script}.sh").read_text()
        assert "@STEPS@" in text or "@RENDEZVOUS@" in text
