"""Estimates for a run on this machine: time and disk space, to one significant digit or so."""

from __future__ import annotations

import time
from collections.abc import Container, Mapping

import numpy as np

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.forest.average_models import average_texts
from btm_scale.forest.scores import all_texts
from btm_scale.launch.gpus import gpu_of_device
from btm_scale.launch.step_time import step_time
from btm_scale.model.shape import ModelShape
from btm_scale.run.launchers import placement
from btm_scale.train.jobs import TrainingJob, model_names, shape_of, training_job, training_stages
from btm_scale.util.cores import visible_cores
from btm_scale.util.devices import usable_gpus_or_none

_START_SECONDS = 15.0  # until a group has imported the engines and built the model
_STEP_SECONDS = 0.02  # of a micro-batch on a CPU, besides matrix products
_TRAINING_SHARE = 0.5  # of the speed of a large matrix product that training reaches on a CPU
_MASTER, _MOMENTS = 4, 8  # bytes per parameter in a checkpoint, float32


def run_seconds(
    config: RunConfig, vocabulary: int, done: Container[str] = (), taken: Mapping[str, int] | None = None
) -> float | None:
    """Return the estimated duration of all stages on this machine; None for a GPU without a data sheet.

    The models that are `done` take no time; `taken` are the steps after which others resume.

    It is right within a factor of about 3, on a machine without other work.
    """
    gpus = usable_gpus_or_none(config.launch.device)
    gpu = gpu_of_device(gpus.kinds[0]) if gpus.names else None
    if gpus.names and gpu is None:
        return None
    speed = 0.0 if gpu is not None else _matrix_speed() / visible_cores()
    length = config.budget.sequence_length

    def seconds(job: TrainingJob, threads: int) -> float:
        shape = shape_of(config, job.model, vocabulary)
        flops = shape.flops_per_token(length, job.trains) / job.layout.ranks
        steps = max(0, job.steps - (taken or {}).get(job.model, 0))
        scored = len(all_texts(config)) * config.evaluate.tokens_per_domain / 3  # forward passes
        if gpu is None:
            rate = _TRAINING_SHARE * speed * threads
            step = job.sequences * length * flops / rate + _STEP_SECONDS * job.accumulation
            return steps * step + scored * flops / rate
        step = step_time(
            shape,
            job.layout,
            gpu,
            sequences=job.sequences,
            length=length,
            accumulation=job.accumulation,
            ranks_per_node=len(gpus.names),
            trains=job.trains,
        ).total
        return (steps + scored / (job.sequences * length)) * step

    total = 0.0
    for stage in training_stages(config):
        place = placement(config, stage)
        ends = [0.0] * place.slots
        for model in (model for model in stage if model not in done):
            first = ends.index(min(ends))
            ends[first] += _START_SECONDS + seconds(training_job(config, model), place.threads)
        total += max(ends)
    return total + _START_SECONDS  # the averages


def disk_bytes(config: RunConfig, vocabulary: int, tokens: int) -> float:
    """Return the estimated size of a finished run: checkpoints, models, averages, scores and `tokens` token ids."""
    length = config.budget.sequence_length
    names = model_names(config)

    def model_bytes(shape: ModelShape, layout: Layout) -> int:
        return shape.parameters * (layout.bytes_per_weight if layout.precision != "auto" else 2)

    def checkpoint_bytes(shape: ModelShape, job: TrainingJob) -> int:
        return _MASTER * shape.parameters + _MOMENTS * shape.trained_parameters(job.trains)

    models = sum(
        model_bytes(shape, job.layout) + config.checkpoint.keep * checkpoint_bytes(shape, job)
        for job in (training_job(config, name) for name in names)
        for shape in [shape_of(config, job.model, vocabulary)]
    )
    averages = len(average_texts(config)) * model_bytes(config.model.shape(vocabulary, length), config.layout)
    scores = 4.0 * len(names) * len(all_texts(config)) * config.evaluate.tokens_per_domain
    return models + averages + scores + tokens * (2 if vocabulary <= 1 << 16 else 4)


def _matrix_speed() -> float:
    """Return the FLOP/s of a float32 matrix product on all of this process's cores."""
    size = 768
    matrix = np.ones((size, size), np.float32)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)
