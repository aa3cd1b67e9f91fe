"""A job's training text: its domains at their shares, and in the last part of the schedule at others."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from btm_scale.config.run import RunConfig
from btm_scale.data.dataset import TrainingBatches
from btm_scale.run_dir import DENSE, SEED, RunDir
from btm_scale.train.jobs import TrainingJob


class TrainingText:
    """The sequences of a job by number; in a torch.distributed world all ranks make this object together."""

    def __init__(self, config: RunConfig, run: RunDir, job: TrainingJob, domains: Mapping[str, float]) -> None:
        length, seed, last = config.budget.sequence_length, _seed(config, job), config.budget.last
        self._main = TrainingBatches(
            run, domains, sequence_length=length, samples=job.samples, seed=seed, part=job.part
        )
        self._last, self._boundary = None, job.samples
        if last is None or not domains.keys() & last.weights.keys():
            return
        # Steps whose end lies in the last part of the schedule.
        early = sum(job.progress_at(step) <= 1.0 - last.share for step in range(1, job.steps + 1))
        self._boundary = job.first_sample + early * job.sequences
        if self._boundary < job.samples:
            raised = {name: share * last.weights.get(name, 1.0) for name, share in domains.items()}
            left = job.samples - self._boundary
            self._last = TrainingBatches(
                run, raised, sequence_length=length, samples=left, seed=seed + 1, part=job.part
            )

    def read(self, first: int, count: int) -> torch.Tensor:
        """`count` sequences from number `first` on, int64 [count, sequence_length + 1]; one step's at the most."""
        if self._last is not None and first >= self._boundary:
            return self._last.read(first - self._boundary, count)
        return self._main.read(first, count)


def _seed(config: RunConfig, job: TrainingJob) -> int:
    # Seed and dense share one order; every branch has its own.
    if job.model in (SEED, DENSE):
        return config.random_seed
    return (config.random_seed + zlib.crc32(job.model.encode())) % 2**31
