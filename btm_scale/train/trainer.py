"""The training loop, from a job's newest checkpoint to the finished expert."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.hf_config import read_shape
from btm_scale.model.trained import freeze_rest
from btm_scale.run_dir import RunDir
from btm_scale.train.bad_batches import Health
from btm_scale.train.balance import RankText
from btm_scale.train.build import new_model
from btm_scale.train.checkpoint import common_state, has_checkpoint, load_state, save_state
from btm_scale.train.dev_loss import DevLoss
from btm_scale.train.engine import Engine
from btm_scale.train.export import export_expert
from btm_scale.train.jobs import TrainingJob, optimizer_of, shape_of
from btm_scale.train.metrics import Metrics
from btm_scale.train.mixture import DomainMixture
from btm_scale.train.monitors import require_monitors, with_monitors
from btm_scale.train.position import restore_random_state, state_path
from btm_scale.train.preemption import StopRequest
from btm_scale.train.profiler import Profile
from btm_scale.train.read_ahead import ReadAhead
from btm_scale.train.retention import kept_steps, remove_old_states, remove_other_decays
from btm_scale.train.start import begin_branch, load_pretrained, settled_branch
from btm_scale.train.watchdog import HangWatch

logger = logging.getLogger(__name__)


def train_and_export(
    group: ExpertGroup, config: RunConfig, run: RunDir, job: TrainingJob, first: Path | None = None
) -> None:
    """Train a job from its newest checkpoint to the end, and export the expert. All ranks call this together.

    `first` is the directory of the model from which a mixture of experts is trained.
    """
    tokenizer = Tokenizer.load(run.tokenizer)
    shape = shape_of(config, job.model, tokenizer.vocab_size) if first is None else read_shape(first)
    optimizer = optimizer_of(config, job.model)
    branch = settled_branch(config, run, job)
    require_monitors(config)
    overrides = with_monitors(config, run, job.model) if group.is_first else config.deepspeed

    def first_model(*, draws: bool = True) -> ExpertModel:
        group.seed(config.random_seed)
        pretrained = None if branch.parents else first or config.expert_model(job.model).pretrained
        model = new_model(group, shape, job, optimizer, overrides, draws=draws and pretrained is None)
        if pretrained is not None and draws:
            load_pretrained(group, model, pretrained)
        model.end_of_text = tokenizer.eos if config.data.separate_documents else None
        model.restarts_positions = config.data.restart_positions
        freeze_rest(model, job.trains)
        return model

    # Weights that a checkpoint or the parents replace need no initialization.
    drawn = not branch.parents and not has_checkpoint(run.checkpoints(job.model))
    engine = Engine(group, first_model(draws=drawn), job, optimizer, overrides)

    def begin() -> int:
        """Set the engine to the job's newest checkpoint, its parents' mean or a new model; returns the step."""
        own = common_state(run.checkpoints(job.model), job)
        if own is not None:
            position = load_state(engine, own)
            restore_random_state(position)
            return position.step
        if branch.parents:
            begin_branch(engine, run, job, branch.parents)
        elif engine.adam_steps > 0 or not drawn:  # the checkpoint may have been damaged
            engine.reset(first_model())
        return 0

    mixture = DomainMixture(config, run, job, branch.domains, tokenizer)
    dev = DevLoss(group, config, run, job, branch.domains)
    steps = train(engine, mixture, dev, config, run, begin)
    best = dev.best_step if dev.best_step != steps else None
    if best is not None:
        load_state(engine, state_path(run.checkpoints(job.model), best))
    export_expert(engine, config, run, branch, tokenizer.eos, steps, best, first)
    # Scoring follows, which loads another copy of the model.
    engine.close()


def train(
    engine: Engine, mixture: DomainMixture, dev: DevLoss, config: RunConfig, run: RunDir, begin: Callable[[], int]
) -> int:
    """Take the steps that remain after `begin`, and return how many were taken; save periodically and after the last.

    Training ends early if the loss on dev text says so. After a bad batch, `begin` restores the engine, and training
    resumes without that batch.
    """
    job, group = engine.job, engine.group
    length, optimizer = config.budget.sequence_length, optimizer_of(config, job.model)
    folder = run.checkpoints(job.model)
    step = begin()
    dev.restart(run.metrics(job.model), step)
    engine.monitors.rewind(step, run.metrics(job.model))
    if step > 0 and group.is_first:
        logger.info("resuming %s at step %d of %d", job.model, step, job.steps)
        # A process that was killed after it saved a checkpoint, the last one too, may have left older ones.
        remove_other_decays(folder, job)
        remove_old_states(folder, step, config.checkpoint.keep, kept_steps(job, dev.best_step))
    own = RankText(
        mixture,
        rank=group.data_rank,
        ranks=group.layout.data,
        balances=config.data.separate_documents and group.layout.sync_every == 1,
        window=engine.model.shape.window,
    )
    health = Health(group, config.health, run.train(job.model), run.metrics(job.model))
    with (
        StopRequest(group, run.train(job.model)) as stop,
        HangWatch(group, config.health) as watch,
        Profile(group, config.profile, run.profile(job.model)) as profile,
        Metrics(group, run.metrics(job.model), job, engine.model.shape, length, step) as metrics,
        ReadAhead(own.read, group.device) as text,
    ):
        pending = False  # whether a checkpoint is to be saved once the data ranks are in sync
        while step < job.steps and not dev.is_over(step):
            step += 1
            result = None
            if not health.leaves_out(step):
                first = job.first_sample + (step - 1) * job.sequences
                rate = job.rate_at(step, optimizer)
                with watch.step():
                    following = first + job.sequences if step < job.steps else None
                    sequences = text.read(first, job.sequences, then=following)
                    domains = own.domains(first, job.sequences) if engine.model.shape.experts else ()
                    result = engine.step(sequences, rate, domains)
                problem = health.problem(step, result)
                if problem is not None:
                    health.leave_out(step, problem)
                    step = begin()
                    engine.monitors.rewind(step, run.metrics(job.model))
                    metrics.rewind(step)
                    dev.restart(run.metrics(job.model), step)
                    continue
            with watch.between_steps():
                in_sync = engine.is_whole_after(step)
                if in_sync:
                    engine.outer_step()
                if result is not None:
                    measured = dev.measure(engine, step, watch.progress) if in_sync and dev.is_due(step) else {}
                    aside = dev.seconds if measured else 0.0
                    engine.monitors.record(metrics.record(step, result, rate, measured, aside=aside))
                    profile.step()
                stops = stop.agreed() and step < job.steps
                ends = step == job.steps or dev.is_over(step)
                saves = step % config.checkpoint.every == 0 or step in (job.stable_steps, dev.best_step)
                pending = pending or stops or ends or saves
                if in_sync and pending:
                    save_state(engine, folder, step, config.checkpoint.keep, watch, kept_steps(job, dev.best_step))
                    pending = False
            if in_sync and stops and not ends:
                stop.leave(step)
        if job.steps == 0:  # a seed LM or branches without training; what follows begins with the checkpoint
            save_state(engine, folder, step, config.checkpoint.keep)
    return step
