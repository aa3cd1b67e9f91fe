"""Build the model that a job's engine will train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.float8 import require_float8
from btm_scale.model.gpt import ExpertModel, build_model
from btm_scale.model.partition import Partition
from btm_scale.model.shape import ModelShape
from btm_scale.train.deepspeed_config import deepspeed_config
from btm_scale.train.jobs import TrainingJob


def new_model(
    group: ExpertGroup,
    shape: ModelShape,
    job: TrainingJob,
    optimizer: OptimizerConfig,
    overrides: Mapping[str, Any],
    *,
    draws: bool = True,
) -> ExpertModel:
    """Return this rank's part of a randomly initialized model. All ranks call this together.

    Without `draws`, matrices are zero, for a model whose weights will be loaded. With ZeRO 3, weight matrices are
    partitioned over the context and data ranks while the model is built. Raises LaunchError if the layout has float8
    and this rank's device does not.
    """
    layout = job.layout
    if layout.float8:
        require_float8(group.device)
    partition = None
    # Data ranks that take local steps each have all weights.
    if layout.zero == 3 and layout.replicas > 1 and layout.sync_every == 1:
        config = deepspeed_config(job, optimizer, overrides)
        partition = Partition(group.replica_group, config, group.dtype)
    return build_model(
        shape,
        tensor=layout.tensor,
        dtype=group.dtype,
        on_cpu=group.device.type == "cpu",
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        offload_activations=layout.offload_activations,
        context=group.context_group,
        partition=partition,
        releases_weights=layout.zero == 3,
        float8=layout.float8,
        draws=draws,
    )
