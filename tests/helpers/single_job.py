"""A model and its training job for scripts that build an engine without a run."""

from __future__ import annotations

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import ExpertModel, build_model
from btm_scale.model.shape import ModelShape
from btm_scale.train.jobs import TrainingJob


def one_step(layout: Layout, sequences: int) -> TrainingJob:
    """Return the job of a model without parents that trains one step on a batch of `sequences`."""
    return TrainingJob(
        model="tiny",
        branch=None,
        weights={},
        part=None,
        steps=1,
        sequences=sequences,
        batch_share=1.0,
        first_sample=0,
        samples=sequences,
        progress=(0.0, 1.0),
        layout=layout,
    )


def model_of(group: ExpertGroup, shape: ModelShape, *, on_cpu: bool = True) -> ExpertModel:
    """Return this rank's part of a random model, as the group's layout says."""
    layout = group.layout
    return build_model(
        shape,
        tensor=layout.tensor,
        dtype=group.dtype,
        on_cpu=on_cpu,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
        offload_activations=layout.offload_activations,
        context=group.context_group,
    )
