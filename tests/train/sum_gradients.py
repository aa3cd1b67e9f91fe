"""Train with gradients summed in products, and as DeepSpeed sums them: `python sum_gradients.py SPEC.json`.

The spec has `cases` (name: `family`, `part`, which is trained alone, and `fused`, whether by the layers for a GPU) and
`result`. For each case the script writes the losses and gradient norms of both, and how many matrix products were added
to sums.
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
from btm_scale.model import gpt
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import freeze_rest
from btm_scale.train import engine, gradient_sums

SIZES: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "positions": 16, "vocabulary": 99}
SHAPES = {
    "llama": ModelShape(family="llama", kv_heads=2, tied=False, **SIZES),
    "gpt2": ModelShape(family="gpt2", kv_heads=4, tied=True, **SIZES),
}


def steps(group: ExpertGroup, case: dict[str, Any], *, immediate: bool = False) -> list[tuple[float, float]]:
    """Return the loss and gradient norm of three steps of three micro-batches."""
    group.seed(0)
    shape, part = SHAPES[case["family"]], case["part"]
    job = dataclasses.replace(one_step(group.layout, 6), steps=3, trains=part)
    with mock.patch.object(gpt, "gpu", return_value=torch.device("cpu")):
        model = model_of(group, shape, on_cpu=not case["fused"])
    freeze_rest(model, part)
    trained = engine.Engine(group, model, job, OptimizerConfig(), {"bf16": {"immediate_grad_update": immediate}})
    text = torch.randint(shape.vocabulary, (3, 6, shape.positions + 1), generator=torch.Generator().manual_seed(1))
    results = [trained.step(batch, 1e-2) for batch in text]
    trained.close()
    return [(result.loss, result.gradient_norm) for result in results]


def compare(spec: dict[str, Any]) -> None:
    group = ExpertGroup.join(Layout(zero=1, precision="bf16", micro_batch=2))
    result = {}
    for name, case in spec["cases"].items():
        with mock.patch.object(gradient_sums, "add_product_", wraps=gradient_sums.add_product_) as added:
            ours = steps(group, case)
        with mock.patch.object(engine, "sum_in_products"):
            theirs = steps(group, case)
        with mock.patch.object(gradient_sums, "add_product_", wraps=gradient_sums.add_product_) as unused:
            immediate = steps(group, case, immediate=True)
        result[name] = {"ours": ours, "theirs": theirs, "products": added.call_count}
        result[name] |= {"immediate": immediate, "immediate products": unused.call_count}
    Path(spec["result"]).write_text(json.dumps(result))
    group.leave()


if __name__ == "__main__":
    fork_world(1, compare, read_spec())
