"""Load model states into the real DeepSpeed engine: `python load_with_engine.py SPEC.json`.

The spec lists folders, each with a model shape and a tensor parallel degree; every rank saves its loaded weights there.
"""

from __future__ import annotations

from typing import Any

import torch
from helpers.worlds import fork_world, read_spec
from safetensors.torch import save_file

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.model.shape import ModelShape


def load(group: ExpertGroup, folder: str, shape: ModelShape) -> None:
    import deepspeed

    group.seed(99)
    model = build_model(shape, tensor=group.layout.tensor, dtype=torch.bfloat16, on_cpu=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        mpu=group.mpu,
        dist_init_required=False,
    )
    engine.load_checkpoint(folder, load_module_only=True)
    weights = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    save_file(weights, f"{folder}/loaded-{group.tensor_rank}.safetensors")
    engine.destroy()


def rank(tensor: int, jobs: list[dict[str, Any]]) -> None:
    group = ExpertGroup.join(Layout(tensor=tensor, data=1, precision="bf16"))
    for job in jobs:
        load(group, job["folder"], ModelShape(**job["shape"]))
    group.leave()


if __name__ == "__main__":
    spec = read_spec()
    for tensor in sorted({job["tensor"] for job in spec}):
        fork_world(tensor, rank, tensor, [job for job in spec if job["tensor"] == tensor])
