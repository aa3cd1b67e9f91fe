"""Trains one step in each of many layouts and counts what lives in memory when the optimizer steps: weights, gradients,
master weights and moments: `measure_memory.py SPEC.json`, two ranks.

The spec has `layouts` (name: group and `accumulate`), `shape` and `result`: where the first rank leaves the bytes.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.live_tensors import living_bytes
from helpers.single_job import model_of, one_step
from helpers.worlds import fork_world, joined_anew, read_spec

from btm_scale.config.layout import Layout
from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import TrainedPart, freeze_rest
from btm_scale.train.engine import Engine


def measure(group: ExpertGroup, shape: ModelShape, accumulate: int, trains: TrainedPart) -> int:
    before = living_bytes()
    layout = group.layout
    job = replace(one_step(layout, layout.data * accumulate), trains=trains)
    model = model_of(group, shape)
    freeze_rest(model, trains)
    engine = Engine(group, model, job, OptimizerConfig(), {})
    sizes = []
    engine._base.register_step_pre_hook(lambda *_: sizes.append(living_bytes() - before))
    engine.step(torch.zeros(accumulate, shape.positions + 1, dtype=torch.long), 1e-3)
    engine.close()
    return max(sizes)


def measure_all(spec: dict[str, Any]) -> None:
    shape = ModelShape.model_validate(spec["shape"])
    group: ExpertGroup | None = None
    result = {}
    for name, values in spec["layouts"].items():
        accumulate, trains = values.pop("accumulate", 1), values.pop("trains", "all")
        config = Layout.model_validate({"micro_batch": 1, **values})
        group = joined_anew(group, config)
        result[name] = measure(group, shape, accumulate, trains)
        gc.collect()
    assert group is not None
    if group.is_first:
        Path(spec["result"]).write_text(json.dumps(result))
    group.leave()


if __name__ == "__main__":
    fork_world(2, measure_all, read_spec())
