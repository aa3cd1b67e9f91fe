"""The stages of a run as one command."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.errors import GroupFailed
from btm_scale.run.pipeline import run_all
from btm_scale.run_dir import RunDir
from btm_scale.util.locks import held


def test_a_second_run_in_a_folder_is_refused_before_it_touches_anything(real_text: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "a.yaml", tiny_values(real_text)), RunDir(tmp_path / "run")
    message = r"Another process runs the stages in .*\. Follow it with: btm-scale status .* --watch\. To start again"
    with held(run.run_lock), pytest.raises(GroupFailed, match=message):
        run_all(config, run, on_progress=lambda rows: None)
    assert sorted(path.name for path in run.root.iterdir()) == [".locks", "run.yaml"]
