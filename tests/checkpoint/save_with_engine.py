"""Save checkpoints with the real DeepSpeed engine: `python save_with_engine.py SPEC.json`.

The spec lists worlds, each with a layout and variants: a folder, a model shape and a ZeRO stage. Beside every
checkpoint the ranks of the first replica save the engine's full weights and Megatron-core's float32 logits for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.worlds import fork_world, read_spec
from safetensors.torch import save_file

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.model.shape import ModelShape


def save(group: ExpertGroup, folder: Path, shape: ModelShape, stage: int) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    group.seed(3)
    tensor = group.layout.tensor
    model = build_model(shape, tensor=tensor, dtype=torch.bfloat16, on_cpu=True)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=config,
        mpu=group.mpu,
        dist_init_required=False,
    )
    draw = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, shape.vocabulary, (group.layout.data, 9), generator=draw)
    mine = tokens[group.data_rank : group.data_rank + 1]
    for _ in range(2):
        engine.backward(engine(mine[:, :-1], mine[:, 1:]))
        engine.step()
    engine.save_checkpoint(str(folder))
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if stage else parameter
        assert full is not None
        weights[name] = full.detach().clone()
    if group.data_rank == 0:
        save_file(weights, folder / f"engine-{group.tensor_rank}.safetensors")
    engine.destroy()
    exact = build_model(shape, tensor=tensor, dtype=torch.float32, on_cpu=True)
    exact.load_state_dict(weights, strict=False)
    with torch.no_grad():
        part = exact(tokens) @ exact.head.T
    parts = [torch.empty_like(part) for _ in range(tensor)]
    dist.all_gather(parts, part.contiguous(), group=group.mpu.get_tensor_model_parallel_group())
    if group.is_first:
        logits = torch.cat(parts, dim=-1)[..., : shape.vocabulary].contiguous()
        save_file({"tokens": tokens, "logits": logits}, folder / "logits.safetensors")


def rank(tensor: int, data: int, variants: list[dict[str, Any]]) -> None:
    group = ExpertGroup.join(Layout(tensor=tensor, data=data, precision="bf16"))
    for variant in variants:
        save(group, Path(variant["folder"]), ModelShape(**variant["shape"]), variant["stage"])
    group.leave()


if __name__ == "__main__":
    for world in read_spec():
        fork_world(world["tensor"] * world["data"], rank, *world.values())
