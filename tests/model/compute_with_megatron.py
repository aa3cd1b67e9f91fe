"""Run Hugging Face models in Megatron-core: `python compute_with_megatron.py SPEC.json`.

The spec has `folders` and tensor parallel degrees. For each, the first rank saves logits, loss, and full weights and
gradients under Hugging Face names to `FOLDER/ours-TENSOR.safetensors`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from helpers.worlds import fork_world, read_spec
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.model.hf_config import shape_from_config
from btm_scale.model.hf_weights import huggingface_tensors, load_weights


def compute(group: ExpertGroup, folder: Path) -> None:
    shape = shape_from_config(json.loads((folder / "config.json").read_text()), folder)
    tensor = group.layout.tensor
    sequence_parallel = bool(shape.experts) and tensor > 1
    model = build_model(shape, tensor=tensor, dtype=torch.float32, on_cpu=True, sequence_parallel=sequence_parallel)
    with SafetensorsModel(folder) as weights:
        load_weights(model, weights.read, group.tensor_rank, tensor)
    tokens = load_file(folder / "theirs/computed.safetensors")["tokens"]
    if not shape.experts:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    part = (model(tokens) @ model.head.T).detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(tensor)]
    dist.all_gather(parts, part)
    results = {"logits": torch.cat(parts, dim=-1)[..., : shape.vocabulary].contiguous()}
    parameters = dict(model.named_parameters())
    group_of_ranks = group.tensor_group
    for name, value in huggingface_tensors(shape, lambda entry: parameters[entry.megatron].detach(), group_of_ranks):
        results[f"weight/{name}"] = value
    if not shape.experts:  # mixtures are not trained
        results["loss"] = loss.detach()
        for name, value in huggingface_tensors(shape, lambda entry: parameters[entry.megatron].grad, group_of_ranks):  # type: ignore[arg-type,return-value]
            results[f"gradient/{name}"] = value
    if group.is_first:
        save_file({name: value.clone() for name, value in results.items()}, folder / f"ours-{tensor}.safetensors")


def rank(tensor: int, folders: list[str]) -> None:
    group = ExpertGroup.join(Layout(tensor=tensor, precision="fp32"))
    dist.barrier()
    segments = list(Path("/dev/shm").glob(f"*_{os.environ['MASTER_PORT']}_*"))
    assert not segments, f"{segments} would outlive the group"
    for folder in folders:
        compute(group, Path(folder))
    group.leave()


if __name__ == "__main__":
    spec = read_spec()
    for tensor in spec["tensor"]:
        fork_world(tensor, rank, tensor, spec["folders"])
