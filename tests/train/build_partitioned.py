"""Measure the memory of building a model at ZeRO 3: `build_partitioned.py SPEC.json`, four data ranks.

The spec has `shape` and `result`, where the first rank writes, in bytes, the `peak` while the model is built, its
`weights` and its largest `layer`; and `equal`, whether the gathered weights are those of a model that is not
partitioned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from deepspeed.runtime.zero import partition_parameters
from helpers.allocations import allocations, memory_profiler
from helpers.single_job import one_step
from helpers.worlds import fork_world, read_spec

from btm_scale.config.layout import Layout
from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.model.partition import complete
from btm_scale.model.shape import ModelShape
from btm_scale.train.build import new_model


def no_broadcast(*arguments: Any, **options: Any) -> None:
    """Take the place of a broadcast; a mock would keep its arguments, and so their memory."""


def measure(spec: dict[str, Any]) -> None:
    layout = Layout(data=4, zero=3, precision="bf16", micro_batch=1)
    group = ExpertGroup.join(layout)
    shape = ModelShape.model_validate(spec["shape"])
    job = one_step(layout, sequences=4)
    new_model(group, shape.model_copy(update={"layers": 1}), job, OptimizerConfig(), {})  # what PyTorch keeps for good
    group.seed(1)
    # All data ranks draw the same weights, so DeepSpeed's broadcast of them changes nothing. But threads of gloo hold
    # its buffers until they are scheduled again, which would make the peak that of the machine's load.
    with (
        mock.patch.object(partition_parameters.dist, "broadcast", no_broadcast),
        memory_profiler() as profiler,
    ):
        cut = new_model(group, shape, job, OptimizerConfig(), {})
    held = allocations(profiler)
    group.seed(1)
    complete_model = build_model(shape, tensor=1, dtype=torch.bfloat16, on_cpu=True)
    equal = True
    for one, other in zip(cut.parameters(), complete_model.parameters(), strict=True):
        with complete(one):
            equal = equal and torch.equal(one, other)
    if group.is_first:
        layer = sum(parameter.nbytes for parameter in complete_model.decoder.layers[0].parameters())
        weights = sum(parameter.nbytes for parameter in complete_model.parameters())
        values = {"peak": max(held), "weights": weights, "layer": layer, "equal": equal}
        Path(spec["result"]).write_text(json.dumps(values))
    group.leave()


if __name__ == "__main__":
    fork_world(4, measure, read_spec())
