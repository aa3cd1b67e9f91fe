"""The data mixture of a job: its domains at their weights, and at other weights in the last part of training."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping

import torch

from btm_scale.config.run import RunConfig
from btm_scale.data.dataset import TrainingSamples
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.run_dir import DENSE, SEED, RunDir
from btm_scale.train.jobs import TrainingJob


class DomainMixture:
    """A job's training samples by index. In a torch.distributed world, all ranks construct this object together."""

    def __init__(
        self, config: RunConfig, run: RunDir, job: TrainingJob, domains: Mapping[str, float], tokenizer: Tokenizer
    ) -> None:
        seed, last = _seed(config, job), config.budget.last
        samples_of = functools.partial(
            TrainingSamples,
            run,
            tokenizer=tokenizer,
            sequence_length=config.budget.sequence_length,
            part=job.part,
        )
        self._main = samples_of(domains, samples=job.samples, seed=seed)
        self._last, self._boundary = None, job.samples
        if last is None or not domains.keys() & last.weights.keys():
            return
        # Steps that end before the last part of the schedule.
        early = sum(job.progress_at(step) <= 1.0 - last.share for step in range(1, job.steps + 1))
        self._boundary = job.first_sample + early * job.sequences
        if self._boundary < job.samples:
            reweighted = {name: share * last.weights.get(name, 1.0) for name, share in domains.items()}
            self._last = samples_of(reweighted, samples=job.samples - self._boundary, seed=seed + 1)

    def read(self, first: int, count: int) -> torch.Tensor:
        """Return `count` samples of one step, starting at index `first`: int64 [count, sequence_length + 1]."""
        if self._last is not None and first >= self._boundary:
            return self._last.read(first - self._boundary, count)
        return self._main.read(first, count)


def _seed(config: RunConfig, job: TrainingJob) -> int:
    # Seed and dense share one order; every branch has its own.
    if job.model in (SEED, DENSE):
        return config.random_seed
    return (config.random_seed + zlib.crc32(job.model.encode())) % 2**31
