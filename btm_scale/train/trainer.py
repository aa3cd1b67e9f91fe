"""The training loop, from where a job stands to the finished expert."""

from __future__ import annotations

import zlib

from btm_scale.config import RunConfig
from btm_scale.data.batches import TrainingBatches
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.run_dir import DENSE, SEED, RunDir
from btm_scale.train.branch import Beginning, begin_branch, beginning
from btm_scale.train.engine import Engine
from btm_scale.train.export import export_expert
from btm_scale.train.job import TrainingJob
from btm_scale.train.metrics import Metrics
from btm_scale.train.state import load_state, newest_state, restore_random_state, save_state
from btm_scale.train.stop import StopRequest


def train_and_export(group: ExpertGroup, config: RunConfig, run: RunDir, job: TrainingJob) -> None:
    """From where the job stands to a finished expert."""
    tokenizer = Tokenizer.load(run.tokenizer)
    shape = config.model.shape(tokenizer.vocab_size, config.budget.sequence_length)
    group.seed(config.random_seed)
    model = build_model(
        shape,
        tensor=job.group.tensor,
        dtype=group.dtype,
        on_cpu=group.device.type == "cpu",
        sequence_parallel=job.group.sequence_parallel,
        recompute=job.group.recompute,
    )
    engine = Engine(group, model, job, config.optimizer, config.deepspeed)
    begun = beginning(config, run, job)
    first_step = _begin(engine, run, job, begun)
    batches = TrainingBatches(
        run,
        begun.domains,
        sequence_length=config.budget.sequence_length,
        samples=job.samples,
        seed=_data_seed(config, job),
        part=job.part,
    )
    train(engine, batches, config, run, first_step)
    export_expert(engine, config, run, begun, tokenizer.eos)


def train(engine: Engine, batches: TrainingBatches, config: RunConfig, run: RunDir, first_step: int) -> None:
    """Take the steps that are left; save every so often, and after the last."""
    job, group = engine.job, engine.group
    share = job.sequences // group.config.data
    folder = run.checkpoints(job.model)
    stop = StopRequest(group, run.train(job.model))
    with Metrics(group, run.metrics(job.model), job, config.budget.sequence_length, first_step) as metrics:
        for step in range(first_step + 1, job.steps + 1):
            first = job.first_sample + (step - 1) * job.sequences + group.data_rank * share
            rate = config.optimizer.rate(job.progress_at(step))
            result = engine.step(batches.read(first, share), rate)
            metrics.record(step, result, rate)
            stops = stop.agreed() and step < job.steps
            if stops or step % config.checkpoint.every == 0 or step == job.steps:
                save_state(engine, folder, step, config.checkpoint.keep)
            if stops:
                stop.leave(step)


def _begin(engine: Engine, run: RunDir, job: TrainingJob, begun: Beginning) -> int:
    """Put the engine where this job stands: at its own newest state, at its parents' end, or at the start."""
    own = newest_state(run.checkpoints(job.model))
    if own is not None:
        position = load_state(engine, own)
        restore_random_state(position)
        return position.step
    if begun.parents:
        begin_branch(engine, run, job, begun.parents)
    return 0


def _data_seed(config: RunConfig, job: TrainingJob) -> int:
    # Seed and dense share one order; every branch has its own.
    if job.model in (SEED, DENSE):
        return config.random_seed
    return (config.random_seed + zlib.crc32(job.model.encode())) % 2**31
