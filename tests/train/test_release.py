"""The memory that a group still holds after training, when scoring begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.worlds import run_script

from btm_scale.config.model import ModelConfig
from btm_scale.config.run import RunConfig
from btm_scale.run_dir import RunDir

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def left(prepared: tuple[RunConfig, RunDir], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Bytes of tensors per parameter after `train_and_export`, by ZeRO stage."""
    config, run = prepared
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(run.root, folder / "run")
    short = config.budget.model_copy(update={"tokens": 4 * config.budget.batch_tokens})
    small = ModelConfig(family="llama", layers=2, hidden=128, heads=4, ffn=256)
    config.model_copy(update={"budget": short, "model": small}).save(folder / "config.yaml")
    spec = {"config": str(folder / "config.yaml"), "run": str(folder / "run"), "stages": STAGES}
    result = folder / "result.json"
    run_script(Path(__file__).with_name("measure_after_training.py"), spec | {"result": str(result)}, folder)
    return dict(json.loads(result.read_text()))


@pytest.mark.parametrize("stage", STAGES)
def test_training_leaves_no_weights_or_moments_in_memory(stage: int, left: dict[str, float]) -> None:
    assert left[str(stage)] <= 1.0
