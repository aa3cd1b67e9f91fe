"""The entry points of a group's ranks, called once the launcher has started them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch.distributed as dist

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.distributed.cpu import keep_freed_memory
from btm_scale.distributed.determinism import make_deterministic
from btm_scale.distributed.group import ExpertGroup
from btm_scale.distributed.precision import fast_precision
from btm_scale.errors import GroupFailed
from btm_scale.evaluate.averages import make_averages
from btm_scale.evaluate.score import score_model
from btm_scale.forest.average_models import average_texts
from btm_scale.forest.scores import all_texts
from btm_scale.forest.turns import changing_config, current_config, evaluating, scoring
from btm_scale.launch.shutdown import end_with_supervisor
from btm_scale.launch.slurm_faults import noting_faults
from btm_scale.run.mixture_stage import first_mixture
from btm_scale.run_dir import MOE, RunDir
from btm_scale.train.jobs import is_trained, training_job
from btm_scale.train.preemption import forget_stop, leaving_at_once
from btm_scale.train.threads import keep_threads
from btm_scale.train.trainer import train_and_export
from btm_scale.train.watchdog import PeerWatch
from btm_scale.util.disk_errors import sentence
from btm_scale.util.locks import ModelLock
from btm_scale.util.rank_log import forget_failure, rank_log

logger = logging.getLogger(__name__)


def train_as_rank(config: RunConfig, run: RunDir, model: str) -> None:
    """Train, export and score one model, skipping completed parts."""
    if os.environ.get("RANK", "0") == "0":
        forget_stop(run.train(model))  # or a failure of this attempt would count as the stop of an earlier one
    with (
        rank_log(run.log(model), model),
        noting_faults(run),
        _disk_errors_as_sentences(),
        _joined(config, run, lambda config: training_job(config, model).layout, records=True) as (group, config),
        ModelLock(run.train(model)) if group.is_first else contextlib.nullcontext(),
    ):
        job = training_job(config, model)
        keep_threads(group, run, model)
        if not group.decided(lambda: is_trained(config, run, model)):
            first = first_mixture(group, config, run, job) if model == MOE else None
            if first != run.model(model):
                train_and_export(group, config, run, job, first)
        with leaving_at_once(run.train(model)):
            score_model(group, config, run, model, all_texts(config), on_text=_log_scored)
        if group.is_first:
            _forget_interruptions(run, model)


def score_as_rank(
    config: RunConfig, run: RunDir, models: Sequence[str], *, averages: bool = False, in_turn: bool = False
) -> None:
    """Score finished models, each on its texts; with `averages`, also merge the missing averages and score all.

    `in_turn`: the process that started the group holds the lock for it.
    """
    is_first = os.environ.get("RANK") == "0"
    if is_first:
        forget_stop(run.train("score"))
    turn = contextlib.nullcontext() if in_turn or not is_first else evaluating(run) if averages else scoring(run)
    with (
        rank_log(run.log("score")),
        turn,
        _disk_errors_as_sentences(),
        leaving_at_once(run.train("score")),
        _joined(config, run, lambda config: config.layout) as (group, config),
    ):
        texts = average_texts(config)  # by the config of the first rank, as the rest
        if averages:
            models = [*models, *make_averages(group, config, run)]
        for model in models:
            score_model(group, config, run, model, texts.get(model) or all_texts(config), on_text=_log_scored)
            if group.is_first:
                _forget_interruptions(run, model)


def _forget_interruptions(run: RunDir, model: str) -> None:
    """Remove the failures and stops of earlier attempts at a model, which `status` would still report."""
    forget_stop(run.train(model))
    forget_failure(run.log(model))


@contextlib.contextmanager
def _disk_errors_as_sentences() -> Iterator[None]:
    """Raise GroupFailed, whose message needs no traceback, for a disk that is full, is broken or refuses this user."""
    try:
        yield
    except OSError as error:
        message = sentence(error)
        if message is None:
            raise
        raise GroupFailed(message) from error


@contextlib.contextmanager
def _joined(
    config: RunConfig, run: RunDir, layout_of: Callable[[RunConfig], Layout], *, records: bool = False
) -> Iterator[tuple[ExpertGroup, RunConfig]]:
    """Yield the group and the config with resolved precisions; `records` as in `_resolved`."""
    end_with_supervisor()
    keep_freed_memory()
    if config.health.deterministic:
        make_deterministic()
    group = ExpertGroup.join(layout_of(config), config.launch.device)
    config = group.decided(partial(_resolved, config, run, records))
    group = group.in_precision(layout_of(config).precision)  # type: ignore[arg-type]
    with PeerWatch(group):
        yield group, config
    # No rank may exit before all have stopped watching.
    dist.barrier()
    # Not after an error: other ranks may be waiting in a collective, and only the launcher can end them.
    group.leave()


def _resolved(config: RunConfig, run: RunDir, records: bool) -> RunConfig:
    """Return the config with each `auto` replaced by the precision recorded in run.yaml.

    If there is none yet, the run's first group, the seed LM's, queries its device and records the answer. A group that
    only scores does not record it (`records`): it may run on a login node, which must not decide for the cluster.
    """
    if "auto" not in config.precisions:
        return config
    with changing_config(run) if records else contextlib.nullcontext():
        recorded = current_config(config, run)
        if "auto" in recorded.precisions:
            recorded = recorded.with_precision(fast_precision())
            if records:
                recorded.save(run.config)
    return config.with_precisions_of(recorded)


def _log_scored(domain: str, split: str) -> None:
    logger.info("scored the %s split of %s", split, domain)
