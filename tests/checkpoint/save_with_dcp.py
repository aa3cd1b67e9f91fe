"""Train a model one step with FSDP2, and save it with torch.distributed.checkpoint in several ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec
from safetensors.torch import save_file


def save(spec: dict[str, Any]) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(12).reshape(1, 12)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    weights = get_model_state_dict(model)
    moments = get_optimizer_state_dict(model, optimizer)
    contents = {
        "model-and-optimizer": {"model": weights, "optimizer": moments, "step": 1},
        "app": {"app": {"model": weights, "optim": moments}},
        "compiled": {"model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}},
        "bare": weights,
        "accelerate/pytorch_model_fsdp_0": {"model": weights},
        "optimizer-only": {"optimizer": moments},
        "two-models": {"student": dict(weights), "teacher": dict(weights)},
    }
    for name, content in contents.items():
        dcp.save(content, checkpoint_id=Path(spec["folder"]) / name)
    full = {name: tensor.full_tensor().contiguous() for name, tensor in weights.items()}
    if dist.get_rank() == 0:
        save_file(full, Path(spec["folder"]) / "expected.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    import transformers  # noqa: F401 (so that the ranks need not import it)

    fork_world(3, save, read_spec())
