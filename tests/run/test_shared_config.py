"""run.yaml while several commands rewrite it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.cli.run import _reread
from btm_scale.config.run import RunConfig
from btm_scale.forest.turns import changing_config
from btm_scale.run import state, worker
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir


def test_a_second_run_does_not_undo_the_precision_that_a_group_records_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, run = tiny_values(tmp_path), RunDir(tmp_path / "run")
    values["layout"] = {"micro_batch": 4, "precision": "auto"}
    config = open_run(write_config(tmp_path / "tiny.yaml", values), run)
    assert "auto" in RunConfig.load(run.config).precisions
    monkeypatch.setattr(worker, "fast_precision", lambda: "fp32")
    group = threading.Thread(target=worker._resolved, args=(config, run, True))
    save = RunConfig.save

    def save_later(self: RunConfig, path: Path) -> None:
        if threading.current_thread() is not group and not group.is_alive():
            group.start()
            group.join(0.3)  # the time in which it would have recorded the precision
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(RunConfig, "save", save_later)
        open_run(config, run)
    group.join(10)
    assert RunConfig.load(run.config).precisions == {"fp32"}
    assert open_run(config, run).precisions == {"fp32"}


def test_a_run_of_its_own_config_keeps_what_another_command_adds_before_it_begins(tmp_path: Path) -> None:
    values, run = tiny_values(tmp_path), RunDir((tmp_path / "run").resolve())
    open_run(write_config(tmp_path / "tiny.yaml", values), run)
    stale = RunConfig.load(run.config)
    opened = list[RunConfig]()

    def second() -> None:
        opened.append(open_run(stale, run, reread=_reread(run.config, [], run)))

    with changing_config(run):  # as `branch` does
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        assert not opened
        grown: dict[str, Any] = stale.model_dump(mode="json") | {"added_domains": {"law": {"text": ["law.jsonl"]}}}
        RunConfig.model_validate(grown).save(run.config)
    thread.join(10)
    assert "law" in opened[0].added_domains
    assert "law" in RunConfig.load(run.config).added_domains


def test_only_the_config_of_the_runs_own_folder_is_read_again(tmp_path: Path) -> None:
    run = RunDir((tmp_path / "run").resolve())
    config = write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path))
    open_run(config, run)
    assert _reread(tmp_path / "tiny.yaml", [], run) is None
    reread = _reread(run.config, ["random_seed=9"], run)
    assert reread is not None
    assert reread().random_seed == 9


def test_a_refused_config_leaves_no_lock_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    config = write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path))

    def refuse(*arguments: Any) -> None:
        raise ValueError("refused")

    monkeypatch.setattr(state, "continued", refuse)
    with pytest.raises(ValueError, match="refused"):
        open_run(config, run)
    assert not run.root.exists()
