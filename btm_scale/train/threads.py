"""The CPU threads of a model's training: recorded, and kept when it resumes, since they decide the order of sums."""

from __future__ import annotations

import logging
import os
import socket

import torch
import torch.distributed as dist
from pydantic import Field

from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import CheckpointError
from btm_scale.run_dir import RunDir
from btm_scale.util.cores import cpu_quota
from btm_scale.util.files import make_directory
from btm_scale.util.records import Record

logger = logging.getLogger(__name__)


class Threads(Record):
    """The threads of each rank of a model's group."""

    ERROR = CheckpointError
    REMEDY = "Delete it: without it, a model resumes with the threads that its launcher sets."

    threads: int = Field(gt=0, le=4096)


def keep_threads(group: ExpertGroup, run: RunDir, model: str) -> None:
    """Train with the threads with which the model's training began, or record how many its launcher set.

    All ranks call this together. Warns if the threads of this group's ranks are more than the cores of their host.
    """
    given = torch.get_num_threads()
    chosen = [_recorded(run, model, given) if group.is_first else given]
    dist.broadcast_object_list(chosen, src=0)
    [threads] = chosen
    if threads != given:
        torch.set_num_threads(threads)
    places: list[tuple[str, frozenset[int]]] = [("", frozenset())] * group.size
    dist.all_gather_object(places, (socket.gethostname(), frozenset(os.sched_getaffinity(0))))
    if group.is_first:
        if threads != given:
            logger.warning(
                "%s resumes with the %d threads per rank with which it began, not with the %d that its launcher sets: "
                "the number of threads decides the order of sums.",
                model,
                threads,
                given,
            )
        if group.device.type == "cpu":
            _report_too_many(places, threads)


def _recorded(run: RunDir, model: str, given: int) -> int:
    """Return the recorded threads of a model that has a checkpoint; of another, record those that are given."""
    path = run.threads(model)
    if any(run.checkpoints(model).glob("step-*")) and (record := Threads.find(path)) is not None:
        return record.threads
    make_directory(path.parent)
    Threads(threads=given).save(path)
    return given


def _report_too_many(places: list[tuple[str, frozenset[int]]], threads: int) -> None:
    quota = cpu_quota()
    for host in dict.fromkeys(host for host, _ in places):
        masks = [mask for name, mask in places if name == host]
        cores: float = len(frozenset().union(*masks))
        if host == socket.gethostname() and quota is not None:
            cores = min(cores, quota)
        if len(masks) * threads > cores:
            logger.warning(
                "%d threads share %g cores of %s (%d ranks with %d each): they wait for one another, and each step "
                "takes longer. Give the group more cores, or choose a layout of fewer ranks.",
                len(masks) * threads,
                cores,
                host,
                len(masks),
                threads,
            )
