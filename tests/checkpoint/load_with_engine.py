"""Loads model states into the real DeepSpeed engine: `python load_with_engine.py SPEC.json`, once a rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from btm_scale.config import GroupConfig
from btm_scale.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.model.shape import ModelShape


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    group = ExpertGroup.join(GroupConfig(tensor=spec["tensor"], data=1))
    import deepspeed

    group.seed(99)
    shape = ModelShape(**spec["shape"])
    model = build_model(shape, tensor=spec["tensor"], dtype=torch.bfloat16, on_cpu=True)
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
    engine.load_checkpoint(spec["folder"], load_module_only=True)
    weights = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    save_file(weights, f"{spec['folder']}/loaded-{group.tensor_rank}.safetensors")
    group.leave()


if __name__ == "__main__":
    main()
