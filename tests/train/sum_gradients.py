"""Train with gradients summed in products, and as DeepSpeed sums them: `python sum_gradients.py SPEC.json`.

The spec has `parts`, each of which is trained alone, and `result`. For each part the script writes the losses and
gradient norms of both, and how many matrix products were added to sums.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.single_job import model_of, one_step
from helpers.worlds import fork_world, read_spec

from btm_scale.config.layout import Layout
from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import TrainedPart, freeze_rest
from btm_scale.train import engine, gradient_sums

SHAPE = ModelShape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, positions=16, vocabulary=99, tied=False)


def steps(group: ExpertGroup, part: TrainedPart, *, immediate: bool = False) -> list[tuple[float, float]]:
    """Return the loss and gradient norm of three steps of three micro-batches."""
    group.seed(0)
    job = dataclasses.replace(one_step(group.layout, 6), steps=3, trains=part)
    model = model_of(group, SHAPE)
    freeze_rest(model, part)
    trained = engine.Engine(group, model, job, OptimizerConfig(), {"bf16": {"immediate_grad_update": immediate}})
    text = torch.randint(SHAPE.vocabulary, (3, 6, SHAPE.positions + 1), generator=torch.Generator().manual_seed(1))
    results = [trained.step(batch, 1e-2) for batch in text]
    trained.close()
    return [(result.loss, result.gradient_norm) for result in results]


def compare(spec: dict[str, Any]) -> None:
    group = ExpertGroup.join(Layout(zero=1, precision="bf16", micro_batch=2))
    result = {}
    for part in spec["parts"]:
        with mock.patch.object(gradient_sums, "add_product_", wraps=gradient_sums.add_product_) as added:
            ours = steps(group, part)
        with mock.patch.object(engine, "sum_in_products"):
            theirs = steps(group, part)
        with mock.patch.object(gradient_sums, "add_product_", wraps=gradient_sums.add_product_) as unused:
            immediate = steps(group, part, immediate=True)
        result[part] = {"ours": ours, "theirs": theirs, "products": added.call_count}
        result[part] |= {"immediate": immediate, "immediate products": unused.call_count}
    Path(spec["result"]).write_text(json.dumps(result))
    group.leave()


if __name__ == "__main__":
    fork_world(1, compare, read_spec())
