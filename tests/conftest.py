"""What tests of several parts share: real text, and one finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import btm_scale, tiny_values, write_config

from btm_scale.config import RunConfig
from btm_scale.run_dir import RunDir


@pytest.fixture(scope="session")
def real_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with python.jsonl, cpp.jsonl, licences.jsonl and docs.jsonl of this installation."""
    from btm_scale.data.installed_text import write_installed_text

    folder = tmp_path_factory.mktemp("text")
    write_installed_text(folder, bytes_per_domain=400_000)
    return folder


@pytest.fixture(scope="session")
def finished_run(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunDir]:
    """A tiny run from text to page, by the command line and the real launcher."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "tiny.yaml", tiny_values(real_text))
    done = btm_scale("run", folder / "tiny.yaml", "--out", folder / "run", "--json")
    run = RunDir(folder / "run")
    assert json.loads(done.stdout) == json.loads(run.results.read_text())
    return config, run
