"""`health.deterministic`: the settings that make training on a GPU bit-identical."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

from btm_scale.config.run import RunConfig
from btm_scale.run_dir import RunDir


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_rank_asks_for_deterministic_kernels_if_the_config_does(
    deterministic: bool, prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, run = prepared
    shutil.copytree(run.root, tmp_path / "run")
    changes: dict[str, Any] = {
        "budget": config.budget.model_copy(update={"tokens": 4 * config.budget.batch_tokens}),
        "health": config.health.model_copy(update={"deterministic": deterministic}),
        "layout": config.layout.model_copy(update={"precision": "fp32"}),
    }
    config.model_copy(update=changes).save(RunDir(tmp_path / "run").config)
    spec = {"run": str(tmp_path / "run"), "result": str(tmp_path / "result.json")}
    run_script(Path(__file__).with_name("train_deterministic.py"), spec, tmp_path)
    settings = json.loads((tmp_path / "result.json").read_text())
    assert settings == {
        "algorithms": deterministic,
        "cublas": ":4096:8" if deterministic else None,
        "cudnn": deterministic,
        "cudnn_attention": not deterministic,
        "embeddings": deterministic,
    }
