"""What one rank of a group runs, once the launcher has started it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from btm_scale.config.run import RunConfig
from btm_scale.distributed.cpu import keep_freed_memory
from btm_scale.distributed.group import ExpertGroup
from btm_scale.evaluate.averages import make_averages
from btm_scale.evaluate.score import score_model
from btm_scale.forest.expert import is_finished
from btm_scale.forest.methods import average_texts
from btm_scale.forest.scores import all_texts
from btm_scale.launch.shutdown import end_with_supervisor
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job
from btm_scale.train.preemption import leaving_at_once
from btm_scale.train.trainer import train_and_export
from btm_scale.train.watchdog import PeerWatch
from btm_scale.util.locks import ModelLock
from btm_scale.util.rank_log import rank_log


def train_as_rank(config: RunConfig, run: RunDir, model: str) -> None:
    """Train, export and score one model; each part that is done already is not done again."""
    job = training_job(config, model)
    with (
        rank_log(run.log(model)),
        _joined(job.layout) as group,
        ModelLock(run.train(model)) if group.is_first else contextlib.nullcontext(),
    ):
        if not is_finished(run.model(model)):
            train_and_export(group, config, run, job)
        with leaving_at_once(run.train(model)):
            score_model(group, config, run, model, all_texts(config), on_text=_say_scored)


def score_as_rank(config: RunConfig, run: RunDir, models: Sequence[str], *, averages: bool = False) -> None:
    """Score finished models on the texts that each is for; with `averages`, those too, made first where needed."""
    texts = average_texts(config)
    with rank_log(run.log("score")), _joined(config.layout) as group:
        if averages:
            models = [*models, *make_averages(group, config, run)]
        for model in models:
            score_model(group, config, run, model, texts.get(model) or all_texts(config), on_text=_say_scored)


@contextlib.contextmanager
def _joined(layout: object) -> Iterator[ExpertGroup]:
    end_with_supervisor()
    keep_freed_memory()
    group = ExpertGroup.join(layout)  # type: ignore[arg-type]
    with PeerWatch(group):
        yield group
    # No rank may go before all have ceased to watch.
    dist.barrier()
    # Not after an error: other ranks may be waiting in a collective, and only the launcher can end them.
    group.leave()


def _say_scored(domain: str, split: str) -> None:
    print(json.dumps({"scored": domain, "split": split}), flush=True)
