"""How the runs of DeepSpeed's monitors are named, grouped, resumed and rewound."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_run import tiny_values

from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError, ConfigError
from btm_scale.run_dir import RunDir
from btm_scale.train import monitors
from btm_scale.train.monitors import Monitors, require_monitors, rewind, with_monitors


def config_with(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(tiny_values(Path(), deepspeed=sections))


def test_a_monitor_without_a_folder_writes_to_that_of_the_run(tmp_path: Path) -> None:
    config = config_with(tensorboard={"enabled": True}, csv_monitor={"enabled": True, "output_path": "mine"})
    section = with_monitors(config, RunDir(tmp_path), "random/0")
    assert section["tensorboard"]["output_path"] == str(tmp_path / "monitors" / "tensorboard")
    assert section["tensorboard"]["job_name"] == "random/0"
    assert section["csv_monitor"]["output_path"] == "mine"


def test_a_run_of_wandb_has_a_name_and_a_group_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = config_with(wandb={"enabled": True}), RunDir(tmp_path)
    ids = []
    for model in ("python", "python", "licences"):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        section = with_monitors(config, run, model)["wandb"]
        assert (section["group"], os.environ["WANDB_NAME"]) == ("tiny", f"tiny/{model}")
        assert (os.environ["WANDB_RESUME"], os.environ["WANDB_DIR"]) == ("allow", str(tmp_path / "monitors" / "wandb"))
        ids.append(os.environ["WANDB_RUN_ID"])
    assert ids[0] == ids[1] != ids[2]
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_NAME", "mine")
    with_monitors(config, run, "python")
    assert os.environ["WANDB_NAME"] == "mine"


def test_a_monitor_follows_no_link_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes, run = tmp_path / "notes", RunDir(tmp_path / "run")
    notes.write_text("private\n")
    link = run.monitors / "csv_monitor" / "random_0" / "loss.csv"
    link.parent.mkdir(parents=True)
    link.symlink_to(notes)
    if os.geteuid() == 0:
        os.lchown(link, 4242, 4242)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(CheckpointError, match="another user made"):
        with_monitors(config_with(csv_monitor={"enabled": True}), run, "random/0")


@pytest.mark.parametrize("content", ["private\n", "", "0123456789abcdef0", "\x1b[31m"])
def test_only_an_id_is_sent_to_wandb(content: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.train("python").mkdir(parents=True)
    (run.train("python") / "wandb-id").write_text(content)
    with pytest.raises(CheckpointError, match="is not the id of a W&B run"):
        with_monitors(config_with(wandb={"enabled": True}), run, "python")
    (run.train("python") / "wandb-id").unlink()
    (tmp_path / "private").write_text("0123456789abcdef")
    (run.train("python") / "wandb-id").symlink_to(tmp_path / "private")
    with pytest.raises(CheckpointError, match="is not the id of a W&B run"):
        with_monitors(config_with(wandb={"enabled": True}), run, "python")


def test_a_monitor_whose_package_is_missing_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "find_spec", lambda name: None)
    require_monitors(config_with(wandb={"enabled": False}, csv_monitor={"enabled": True}))
    with pytest.raises(
        ConfigError, match=r"deepspeed\.wandb is enabled, and wandb is not installed.*pip install wandb"
    ):
        require_monitors(config_with(wandb={"enabled": True}))


class Writer:
    """TensorBoard's SummaryWriter, as far as it is used."""

    def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step

    def close(self) -> None: ...


def test_later_steps_are_dropped_and_headers_written_once(tmp_path: Path) -> None:
    file, foreign = tmp_path / "python_loss.csv", tmp_path / "licences_loss.csv"
    file.write_text("step,loss\n1,3.0\n2,2.9\nstep,loss\n3,2.8\n4,2.7\n")
    foreign.write_text("step,loss\n9,1.0\n")
    written: Any = SimpleNamespace(log_dir=str(tmp_path), filenames=[])
    board: Any = SimpleNamespace(summary_writer=Writer("logs"))
    rewind(SimpleNamespace(csv_monitor=written, tb_monitor=board), "python", 3)
    assert file.read_text().splitlines() == ["step,loss", "1,3.0", "2,2.9", "3,2.8"]
    assert foreign.read_text() == "step,loss\n9,1.0\n"
    assert written.filenames == ["python_loss"]
    assert (board.summary_writer.log_dir, board.summary_writer.purge_step) == ("logs", 4)


class WandbRun:
    """A run of W&B: as its documentation says, what is logged at a step below the last one is dropped."""

    def __init__(self) -> None:
        self.history: dict[int, dict[str, float]] = {}

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        for label, value, step in events:
            if step >= max(self.history, default=0):
                self.history.setdefault(step, {})[label] = value


class Written:
    """Every event of a monitor that can be rewound, in order."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        self.steps += [step for _, _, step in events]


def engine_with(**monitors: Any) -> Any:
    names = ("tb_monitor", "csv_monitor", "wandb_monitor", "comet_monitor")
    master = SimpleNamespace(enabled=True, **(dict.fromkeys(names) | monitors))
    return SimpleNamespace(monitor=master)


def test_monitors_get_the_steps_of_the_model_and_none_of_the_engines_samples() -> None:
    run = WandbRun()
    engine = engine_with(wandb_monitor=run)
    monitors = Monitors(engine, "law")
    for step in (1, 2, 3):
        if engine.monitor.enabled:  # as DeepSpeed does after each step
            run.write_events([("Train/Samples/lr", 1e-3, step * 64)])
        monitors.record({"step": step, "loss": 3.0 - step})
    assert run.history == {step: {"law/loss": 3.0 - step} for step in (1, 2, 3)}


def test_a_monitor_that_forgets_nothing_gets_no_step_twice(tmp_path: Path) -> None:
    """The process was killed after step 5, and resumes from a checkpoint of step 3; step 7 is a bad batch."""
    metrics, run, comet = tmp_path / "metrics.jsonl", WandbRun(), Written()
    metrics.write_text("".join(json.dumps({"step": step, "loss": 3.0}) + "\n" for step in range(1, 6)))
    monitors = Monitors(engine_with(wandb_monitor=run, comet_monitor=comet), "law")
    monitors.rewind(3, metrics)
    for step in (4, 5, 6):
        monitors.record({"step": step, "loss": 2.0})
    monitors.rewind(3, metrics)
    for step in (4, 5, 6, 8):
        monitors.record({"step": step, "loss": 1.0})
    assert run.history == {6: {"law/loss": 2.0}, 8: {"law/loss": 1.0}}
    assert comet.steps == [6, 8]
