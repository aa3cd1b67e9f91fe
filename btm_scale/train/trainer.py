"""The training loop, from a job's newest checkpoint to the finished expert."""

from __future__ import annotations

import logging
from collections.abc import Callable

from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import ExpertModel
from btm_scale.run_dir import RunDir
from btm_scale.train.bad_batches import Health
from btm_scale.train.build import new_model
from btm_scale.train.checkpoint import common_state, load_state, remove_old_states, save_state
from btm_scale.train.engine import Engine
from btm_scale.train.export import export_expert
from btm_scale.train.jobs import TrainingJob
from btm_scale.train.metrics import Metrics
from btm_scale.train.mixture import DomainMixture
from btm_scale.train.position import restore_random_state
from btm_scale.train.preemption import StopRequest
from btm_scale.train.profiler import Profile
from btm_scale.train.start import begin_branch, load_pretrained, settled_branch
from btm_scale.train.watchdog import HangWatch

logger = logging.getLogger(__name__)


def train_and_export(group: ExpertGroup, config: RunConfig, run: RunDir, job: TrainingJob) -> None:
    """Train a job from its newest checkpoint to the end, and export the expert. All ranks call this together."""
    tokenizer = Tokenizer.load(run.tokenizer)
    sizes = config.expert_model(job.model)
    shape = sizes.shape(tokenizer.vocab_size, config.budget.sequence_length)
    branch = settled_branch(config, run, job)

    def first_model() -> ExpertModel:
        group.seed(config.random_seed)
        model = new_model(group, shape, job, config.optimizer, config.deepspeed)
        if sizes.pretrained is not None and not branch.parents:
            load_pretrained(group, model, sizes.pretrained, tokenizer)
        model.end_of_text = tokenizer.eos if config.data.separate_documents else None
        return model

    engine = Engine(group, first_model(), job, config.optimizer, config.deepspeed)

    def begin() -> int:
        """Set the engine to the job's newest checkpoint, its parents' mean or a new model; returns the step."""
        own = common_state(run.checkpoints(job.model))
        if own is not None:
            position = load_state(engine, own)
            restore_random_state(position)
            return position.step
        if branch.parents:
            begin_branch(engine, run, job, branch.parents)
        elif engine.adam_steps > 0:
            engine.reset(first_model())
        return 0

    mixture = DomainMixture(config, run, job, branch.domains, tokenizer)
    train(engine, mixture, config, run, begin)
    export_expert(engine, config, run, branch, tokenizer.eos)
    # Scoring follows, which loads another copy of the model.
    engine.close()


def train(engine: Engine, mixture: DomainMixture, config: RunConfig, run: RunDir, begin: Callable[[], int]) -> None:
    """Take the steps that remain after `begin`; save periodically and after the last step.

    After a bad batch, `begin` restores the engine, and training resumes without that batch.
    """
    job, group = engine.job, engine.group
    rank_sequences = job.sequences // group.layout.data
    length = config.budget.sequence_length
    folder = run.checkpoints(job.model)
    step = begin()
    if step > 0 and group.is_first:
        logger.info("resuming %s at step %d of %d", job.model, step, job.steps)
        # A process that was killed after it saved a checkpoint, the last one too, may have left older ones.
        remove_old_states(folder, step, config.checkpoint.keep)
    health = Health(group, config.health, run.train(job.model), run.metrics(job.model))
    with (
        StopRequest(group, run.train(job.model)) as stop,
        HangWatch(group, config.health) as watch,
        Profile(group, config.profile, run.profile(job.model)) as profile,
        Metrics(group, run.metrics(job.model), job, engine.model.shape, length, step) as metrics,
    ):
        pending = False  # whether a checkpoint is to be saved once the data ranks are in sync
        while step < job.steps:
            step += 1
            if not health.leaves_out(step):
                first = job.first_sample + (step - 1) * job.sequences + group.data_rank * rank_sequences
                rate = config.optimizer.rate(job.progress_at(step))
                with watch.step():
                    result = engine.step(mixture.read(first, rank_sequences), rate)
                problem = health.problem(step, result)
                if problem is not None:
                    health.leave_out(step, problem)
                    step = begin()
                    metrics.rewind(step)
                    continue
                engine.tell_monitor(metrics.record(step, result, rate))
                profile.step()
            with watch.between_steps():
                stops = stop.agreed() and step < job.steps
                pending = pending or stops or step % config.checkpoint.every == 0 or step == job.steps
                in_sync = engine.is_whole_after(step)
                if in_sync:
                    engine.outer_step()
                if in_sync and pending:
                    save_state(engine, folder, step, config.checkpoint.keep, watch)
                    pending = False
            if in_sync and stops:
                stop.leave(step)
        if job.steps == 0:  # a pretrained model without training; branches begin with its checkpoint
            save_state(engine, folder, step, config.checkpoint.keep)
