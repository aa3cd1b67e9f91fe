"""Save partly frozen Hugging Face models with DeepSpeed's engine, and convert them to universal checkpoints.

The spec has a base, a folder and, by name, the checkpoints: a ZeRO stage, and whether frozen parameters are excluded.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec
from safetensors.torch import save_file

from btm_scale.distributed.cpu import leave_out_shared_memory_op


def save(spec: dict[str, Any]) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from transformers import AutoModelForCausalLM

    leave_out_shared_memory_op()  # it never removes its buffers from /dev/shm
    deepspeed.init_distributed("gloo", verbose=False)
    for name, (stage, exclude) in spec["checkpoints"].items():
        model = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.float32)
        for parameter, tensor in model.named_parameters():
            tensor.requires_grad_("layers.0" not in parameter)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            config={
                "train_micro_batch_size_per_gpu": 1,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage},
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
                "steps_per_print": 10**9,
            },
        )
        tokens = torch.arange(12).reshape(1, 12)
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()
        engine.save_checkpoint(str(Path(spec["folder"]) / name), exclude_frozen_parameters=exclude)
        weights: dict[str, torch.Tensor] = {}
        for parameter, tensor in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([tensor], enabled=stage == 3):
                full = safe_get_full_fp32_param(tensor) if tensor.requires_grad else tensor
                weights[parameter] = full.detach().clone()
        if deepspeed.comm.get_rank() == 0:
            save_file(weights, Path(spec["folder"]) / f"{name}.safetensors")
        engine.destroy()


def convert(folder: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=str(folder / "global_step1"),
            output_folder=str(folder / "universal/step_1"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


if __name__ == "__main__":
    import transformers  # noqa: F401 (so that the ranks need not import it)

    spec = read_spec()
    fork_world(3, save, spec)
    for name, (_, exclude) in spec["checkpoints"].items():
        if not exclude:
            convert(Path(spec["folder"]) / name)
