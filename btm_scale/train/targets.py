"""Inputs and targets of sequences, where conversations leave targets out, and the normalization of a step's loss."""

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

    If `flagged`, targets to leave out are -1, and a third tensor, bool [count, length], marks where documents start.
    """
    if not flagged:
        return sequences[:, :-1], sequences[:, 1:]
    ids, following = sequences & IDS, sequences[:, 1:]
    targets = ids[:, 1:].masked_fill((following & UNTRAINED) != 0, -1)
    return ids[:, :-1], targets, (sequences[:, :-1] & START) != 0


def targets_per_loss(sequences: Tensor, group: ExpertGroup, job: TrainingJob) -> float | None:
    """Return the divisor of a micro-batch's summed loss with which all targets of the step have the same weight.

    DeepSpeed then averages over micro-batches, context and data ranks. None for sequences in which every token is a
    target.
    """
    if not has_flags(sequences):
        return None
    count = _targets(sequences).double().to(group.device)
    ranks = group.layout.replicas if job.layout.sync_every == 1 else 1  # with local steps, each rank has its own mean
    if ranks > 1:
        dist.all_reduce(count, group=group.replica_group)
        count /= group.layout.context  # context ranks have counted the same sequences
    return max(1.0, float(count)) / (ranks * job.accumulation)


def targets_on_each(sequences: Tensor, ranks: int) -> float:
    """Return the divisor of a rank's summed loss of its part of sequences, whose mean over `ranks` is the mean loss."""
    return max(1.0, float(_targets(sequences))) / ranks


def weight_of(sequences: Tensor) -> float:
    """Return the weight of a batch's mean loss in a mean over batches: the number of targets, or of sequences."""
    if not len(sequences) or not has_flags(sequences):
        return len(sequences)
    return float(_targets(sequences))


def _targets(sequences: Tensor) -> Tensor:
    """Return the number of targets that are trained on, of sequences with flags."""
    return torch.count_nonzero((sequences[:, 1:] & UNTRAINED) == 0)
