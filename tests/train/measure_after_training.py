"""Train and export one model at several ZeRO stages, and count what stays in memory: `measure_after_training.py SPEC`.

The spec has `config` (a YAML file), `run` (a prepared run's folder), `stages` and `result`, where the bytes of tensors
per parameter are written by stage.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.live_tensors import living_bytes
from helpers.worlds import fork_world, joined_anew, read_spec

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.run_dir import SEED, RunDir
from btm_scale.train.jobs import training_job
from btm_scale.train.trainer import train_and_export


def measure(spec: dict[str, Any]) -> None:
    config = RunConfig.load(Path(spec["config"]))
    group: ExpertGroup | None = None
    result = {}
    for stage in spec["stages"]:
        layout = Layout(precision="bf16", zero=stage, micro_batch=8)
        group = joined_anew(group, layout)
        config = config.model_copy(update={"layout": layout})
        run = RunDir(Path(spec["run"]).with_name(f"zero-{stage}"))
        shutil.copytree(spec["run"], run.root)
        job = training_job(config, SEED)
        assert job.accumulation > 1, "gradients are summed over micro-batches"
        before = living_bytes()
        train_and_export(group, config, run, job)
        shape = config.model.shape(512, config.budget.sequence_length)
        result[stage] = (living_bytes() - before) / shape.parameters
        assert run.model(SEED).is_dir()
    Path(spec["result"]).write_text(json.dumps(result))
    assert group is not None
    group.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    fork_world(1, measure, read_spec())
