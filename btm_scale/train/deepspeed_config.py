"""The DeepSpeed config of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from btm_scale.config.training import OptimizerConfig
from btm_scale.train.jobs import TrainingJob


def deepspeed_config(job: TrainingJob, optimizer: OptimizerConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that the job needs, with the run's `deepspeed` section merged over it."""
    layout = job.layout
    zero: dict[str, Any] = {"stage": layout.zero}
    if torch.cuda.is_available() and layout.zero in (1, 2):
        zero["overlap_comm"] = True  # with the backward pass
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if layout.offload != "none":
        zero["offload_optimizer"] = host
    if layout.offload == "all":
        zero["offload_param"] = host
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": optimizer.clip,
        "bf16": {"enabled": layout.precision == "bf16"},
        "fp16": {"enabled": layout.precision == "fp16"},
        "zero_optimization": zero,
        # PyTorch's fused AdamW is as fast on the host as DeepSpeed's, which would have to be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if job.accumulation > 1 and layout.precision != "fp32" and layout.zero > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, overrides)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        inner = base.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = _merged(inner, value)
        result[key] = value
    return result
