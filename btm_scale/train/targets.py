"""Inputs and targets of sequences, of which conversations leave some out, and the number that a step's loss is over."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from btm_scale.data.chat.packing import IDS, START, UNTRAINED
from btm_scale.distributed.group import ExpertGroup
from btm_scale.train.jobs import TrainingJob


def has_flags(sequences: Tensor) -> bool:
    """Return whether sequences have the flags of `data/chat/packing.py`: the first token starts a document."""
    return bool(sequences[0, 0] & START)


def inputs_and_targets(sequences: Tensor, *, flagged: bool) -> tuple[Tensor, ...]:
    """Return inputs and targets, int64 [count, length], of sequences [count, length + 1].

    Of flagged ones, targets to leave out are -1, and the third tensor has the first tokens of documents, bool.
    """
    if not flagged:
        return sequences[:, :-1], sequences[:, 1:]
    ids, following = sequences & IDS, sequences[:, 1:]
    targets = ids[:, 1:].masked_fill((following & UNTRAINED) != 0, -1)
    return ids[:, :-1], targets, (sequences[:, :-1] & START) != 0


def targets_per_loss(sequences: Tensor, group: ExpertGroup, job: TrainingJob) -> float | None:
    """Return what the sum of a micro-batch's losses is divided by, so that every target of the step counts the same.

    DeepSpeed then averages over micro-batches and data ranks. None for sequences in which every token is a target.
    """
    if not has_flags(sequences):
        return None
    count = ((sequences[:, 1:] & UNTRAINED) == 0).sum().double().to(group.device)
    ranks = group.layout.data if job.layout.sync_every == 1 else 1  # ranks that take local steps each have their mean
    if ranks > 1:
        dist.all_reduce(count, group=group.mpu.get_data_parallel_group())
    return max(1.0, float(count)) / (ranks * job.accumulation)


def weight_of(sequences: Tensor) -> float:
    """Return the weight of the mean loss of sequences in a mean over several: that of their targets."""
    if not len(sequences) or not has_flags(sequences):
        return len(sequences)
    return float(torch.count_nonzero((sequences[:, 1:] & UNTRAINED) == 0))
