"""Save or load torch_dist checkpoints with Megatron-core: `python torch_dist_with_megatron.py SPEC.json`.

The spec has, by tensor degree, a list of `save` and `load` jobs with a folder and a model shape; after each job every
rank saves its weights to `OUT-RANK.safetensors`.
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


def run(group: ExpertGroup, job: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    group.seed(int(job["seed"]))
    shape = ModelShape(**job["shape"])
    model = build_model(shape, tensor=group.layout.tensor, dtype=torch.bfloat16, on_cpu=True)
    if job["verb"] == "save":
        dist_checkpointing.save(model.sharded_state_dict(prefix=""), job["folder"])
    else:
        loaded = dist_checkpointing.load(model.sharded_state_dict(prefix=""), job["folder"])
        model.load_state_dict(loaded)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    save_file(weights, f"{job['out']}-{group.tensor_rank}.safetensors")


def rank(tensor: int, jobs: list[dict[str, Any]]) -> None:
    group = ExpertGroup.join(Layout(tensor=tensor, data=1, precision="bf16"))
    for job in jobs:
        run(group, job)
    group.leave()


if __name__ == "__main__":
    for tensor, jobs in read_spec().items():
        fork_world(int(tensor), rank, int(tensor), jobs)
