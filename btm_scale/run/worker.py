"""What one rank of a group runs, once the launcher has started it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from btm_scale.config.run import RunConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.evaluate.averages import planned_averages, write_averages
from btm_scale.evaluate.score import score_model
from btm_scale.evaluate.soups import choose_soups, soups
from btm_scale.forest.expert import is_finished
from btm_scale.forest.methods import GREEDY, average_texts, averages_of
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
            models = [*models, *_made_averages(group, config, run)]
        for model in models:
            score_model(group, config, run, model, texts.get(model) or all_texts(config), on_text=_say_scored)


def _made_averages(group: ExpertGroup, config: RunConfig, run: RunDir) -> list[str]:
    """Merge the averages that are missing; their names, on every rank."""
    # Large models take longer to merge, and many weights longer to find, than any collective of training may wait.
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    # Asked by one rank: another might see what the first has done about it.
    undecided = [GREEDY in averages_of(config, run) and soups(config, run) is None]
    dist.broadcast_object_list(undecided, src=0)
    if undecided[0]:
        choose_soups(group, config, run)
    cards = [planned_averages(config, run) if group.is_first else []]
    dist.broadcast_object_list(cards, src=0, group=patient)
    if group.is_first:
        begin = time.perf_counter()
        merged = write_averages(run, cards[0])
        print(json.dumps({"merged": merged, "seconds": round(time.perf_counter() - begin, 3)}), flush=True)
    dist.barrier(patient)
    return [card.name for card in cards[0]]


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


def keep_freed_memory() -> None:
    """Tell glibc to reuse large buffers instead of returning them to the kernel and faulting them in again.

    A step on CPU takes and frees the same activations over and over; this is worth a tenth of its time.
    """
    mmap_threshold, trim_threshold = -3, -1
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def _say_scored(domain: str, split: str) -> None:
    print(json.dumps({"scored": domain, "split": split}), flush=True)
