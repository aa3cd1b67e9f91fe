"""The data mixture of a job: its domains at their weights, and at other weights in the last part of training."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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
        samples_of = functools.partial(
            TrainingSamples,
            run,
            tokenizer=tokenizer,
            sequence_length=config.budget.sequence_length,
            part=job.part,
        )
        seed, last = _seed(config, job), config.budget.last
        reweighted: dict[str, float] = {}
        if last is not None and domains.keys() & last.weights.keys():
            reweighted = {name: share * last.weights.get(name, 1.0) for name, share in domains.items()}
        # (index after the last sample, index of the first, samples), in the order of training
        self._parts: list[tuple[int, int, TrainingSamples]] = []
        before = 0
        for number, stretch in enumerate(job.stretches):
            if not stretch.samples:  # a branch that takes no step until its budget is raised
                continue
            boundary = stretch.samples
            if last is not None and reweighted:
                # Steps that end before the last part of the schedule.
                steps = range(before + 1, stretch.steps + 1)
                early = before + sum(job.progress_at(step) <= 1.0 - last.share for step in steps)
                boundary = job.first_sample + early * job.sequences
            # Where no text is repeated, the order of a larger budget begins with the samples of the smaller one.
            self._parts.append((boundary, 0, samples_of(domains, samples=stretch.samples, seed=seed)))
            if boundary < stretch.samples:
                rest = samples_of(reweighted, samples=stretch.samples - boundary, seed=seed + 1 + number)
                self._parts.append((stretch.samples, boundary, rest))
            before = stretch.steps

    def read(self, first: int, count: int) -> torch.Tensor:
        """Return `count` samples of one step, starting at index `first`: int64 [count, sequence_length + 1]."""
        begin, samples = self._part_of(first)
        return samples.read(first - begin, count)

    def select(self, first: int, offsets: Sequence[int]) -> torch.Tensor:
        """Return the samples at these offsets from index `first`, all of one step, as `read` does."""
        begin, samples = self._part_of(first)
        return samples.select([first - begin + offset for offset in offsets])

    def document_lengths(self, first: int, count: int) -> list[np.ndarray[Any, Any]]:
        """Return the lengths of the documents in the inputs of the samples that `read` returns, in tokens."""
        begin, samples = self._part_of(first)
        return samples.document_lengths(first - begin, count)

    def domains(self, first: int, offsets: Sequence[int]) -> list[str]:
        """Return the domain of each of the samples that `select` returns."""
        begin, samples = self._part_of(first)
        return samples.domains([first - begin + offset for offset in offsets])

    def _part_of(self, first: int) -> tuple[int, TrainingSamples]:
        """Return the samples that index `first` is of, and the index of their first."""
        return next(((begin, samples) for end, begin, samples in self._parts if first < end), self._parts[-1][1:])


def _seed(config: RunConfig, job: TrainingJob) -> int:
    # Seed and dense share one order; every branch has its own.
    if job.model in (SEED, DENSE):
        return config.random_seed
    return (config.random_seed + zlib.crc32(job.model.encode())) % 2**31
