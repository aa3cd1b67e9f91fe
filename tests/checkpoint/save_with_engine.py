"""Saves checkpoints with the real DeepSpeed engine: `python save_with_engine.py SPEC.json`, once a rank.

The spec lists variants, each with a folder, a model shape and a ZeRO stage. Beside every checkpoint the ranks
of the first replica leave the engine's own full weights, and the first rank some hidden states.
"""

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


def save(group: ExpertGroup, folder: Path, shape: ModelShape, stage: int) -> None:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param

    group.seed(3)
    model = build_model(shape, tensor=group.config.tensor, dtype=torch.bfloat16, on_cpu=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        mpu=group.mpu,
        dist_init_required=False,
    )
    draw = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, shape.vocabulary, (group.config.data, 9), generator=draw)
    mine = tokens[group.data_rank : group.data_rank + 1]
    for _ in range(2):
        loss = engine(mine[:, :-1], mine[:, 1:])
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder))
    hidden = engine(tokens[:, :-1])
    weights = {
        name: safe_get_full_fp32_param(p) if stage else p for name, p in engine.module.named_parameters()
    }
    weights = {name: tensor.detach().clone() for name, tensor in weights.items() if tensor is not None}
    if group.data_rank == 0:
        save_file(weights, folder / f"engine-{group.tensor_rank}.safetensors")
    if group.is_first:
        save_file({"tokens": tokens[:, :-1].contiguous(), "hidden": hidden.detach().float().contiguous()},
                  folder / "hidden.safetensors")  # fmt: skip
    dist.barrier()
    engine.destroy()


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    group = ExpertGroup.join(GroupConfig(tensor=spec["tensor"], data=spec["data"]))
    for variant in spec["variants"]:
        save(group, Path(variant["folder"]), ModelShape(**variant["shape"]), variant["stage"])
    group.leave()


if __name__ == "__main__":
    main()
