"""The stages of a run as one command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import GroupFailed
from btm_scale.forest.open import open_folder
from btm_scale.launch.supervise import GroupCommand
from btm_scale.run.grow import branch_expert
from btm_scale.run.pipeline import run_all, score_models
from btm_scale.run_dir import RunDir
from btm_scale.util.locks import held


def test_a_second_run_in_a_folder_is_refused_before_it_touches_anything(real_text: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path / "a.yaml", tiny_values(real_text)), RunDir(tmp_path / "run")
    message = r"Another process runs the stages in .*\. Follow it with: btm-scale status .* --watch\. To start again"
    with held(run.run_lock), pytest.raises(GroupFailed, match=message):
        run_all(config, run, on_progress=lambda rows: None)
    assert sorted(path.name for path in run.root.iterdir()) == [".locks", "run.yaml"]


def test_a_group_scores_with_the_config_that_its_command_read(
    handmade: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    """`branch` doesn't wait for commands that score, and no model has scores of its domain yet."""
    config, run = handmade[0], RunDir(tmp_path / "run")
    shutil.copytree(handmade[1].root, run.root)
    text = tmp_path / "recipes.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"recipe {number}: take {number} eggs. " * 40}) for number in range(99))
    )
    started = list[GroupCommand]()

    def launcher(commands: Sequence[GroupCommand], on_poll: Callable[[dict[str, str]], None]) -> None:
        started.extend(commands)
        branch_expert(config, run, "recipes", "seed", text=[text])
        words = commands[0].arguments
        theirs, _ = open_folder(run.root, Path(words[words.index("--config") + 1]))
        assert theirs.all_domains == config.all_domains

    assert score_models(config, run, ["python"], launcher) == ["python"]
    assert len(started) == 1
    assert "recipes" in RunConfig.load(run.config).added_domains
    assert not [path for path in run.root.iterdir() if path.name.endswith(".partial")]
