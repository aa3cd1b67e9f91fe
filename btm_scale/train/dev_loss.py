"""Loss on dev text while a model trains, which may end the training early and choose the checkpoint to export."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.distributed.group import ExpertGroup
from btm_scale.run_dir import SEED, RunDir
from btm_scale.train.engine import Engine
from btm_scale.train.jobs import TrainingJob
from btm_scale.train.metrics import DEV_LOSS, read_metrics
from btm_scale.train.targets import weight_of

logger = logging.getLogger(__name__)


class DevLoss:
    """Measures a model on the dev text of the domains that it trains on. All ranks call every method together.

    The measured losses are kept in metrics.jsonl, so that a restart decides as the interrupted process would have.
    """

    def __init__(
        self, group: ExpertGroup, config: RunConfig, run: RunDir, job: TrainingJob, domains: Mapping[str, float]
    ) -> None:
        self._group, self._job, self._config = group, job, config.dev_loss
        self._weights = {domain: share for domain, share in domains.items() if share > 0}
        # The branches continue the seed LM's schedule, so that it takes every step.
        self._decides = self._config.every > 0 and job.model != SEED
        self._blocks: dict[str, torch.Tensor] = {}
        if self._config.every:
            self._blocks = {domain: blocks for domain in self._weights if len(blocks := _blocks(config, run, domain))}
            left_out = ", ".join(domain for domain in self._weights if domain not in self._blocks)
            if left_out and group.is_first:
                logger.warning("no dev loss of %s: the dev text is shorter than one sequence", left_out)
        self._losses: dict[int, float] = {}
        self.seconds = 0.0  # that the last measurement took

    def restart(self, path: Path, step: int) -> None:
        """Read the losses measured up to `step` from a metrics.jsonl."""
        if not self._config.every:
            return

        def known() -> dict[int, float]:
            rows = read_metrics(path)
            return {row["step"]: row[DEV_LOSS] for row in rows if DEV_LOSS in row and row["step"] <= step}

        self._losses = self._group.decided(known)

    def is_due(self, step: int) -> bool:
        """Return whether the model is to be measured after this step."""
        if not self._blocks:
            return False
        return step % self._config.every == 0 or step == self._job.steps

    def measure(self, engine: Engine, step: int, progress: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return the loss of each domain in nats, and their mean by the domains' amounts of training text.

        Returns nothing if one is not finite. `progress` is called after each domain.
        """
        begin = time.perf_counter()
        losses: list[Any] = [{}]
        for domain, blocks in self._blocks.items():
            losses[0][domain] = mean_loss(engine, blocks)
            progress()
        # Tensor ranks may differ in the last bit, and all must decide the same.
        dist.broadcast_object_list(losses, src=0)
        total = sum(self._weights[domain] for domain in self._blocks)
        mean = sum(self._weights[domain] * loss for domain, loss in losses[0].items()) / total
        self.seconds = time.perf_counter() - begin
        if not math.isfinite(mean):
            return {}
        self._losses[step] = mean
        return {DEV_LOSS: mean} | {f"{DEV_LOSS}/{domain}": loss for domain, loss in losses[0].items()}

    @property
    def best_step(self) -> int | None:
        """The step with the lowest loss, if its checkpoint is to be exported; the first of several."""
        if not (self._decides and self._config.best and self._losses):
            return None
        return min(self._losses, key=lambda step: (self._losses[step], step))

    def is_over(self, step: int) -> bool:
        """Return whether the loss has not become lower for so long that training ends after this step."""
        patience = self._config.patience
        earlier = self._job.earlier[-1].steps if self._job.earlier else 0
        if not self._decides or patience is None or step <= earlier or step not in self._losses:
            return False
        values = [self._losses[measured] for measured in sorted(self._losses)]
        return len(values) > patience and min(values[-patience:]) >= min(values[:-patience])


def mean_loss(engine: Engine, sequences: torch.Tensor) -> float:
    """Return the mean loss in nats of sequences [count, length + 1], the same on every context and data rank.

    The sequences are distributed over the data ranks, which all take part in as many forward passes.
    """
    group, size = engine.group, engine.job.micro_batch
    own = sequences[group.data_rank :: group.layout.data]
    total = torch.zeros(2, dtype=torch.float64, device=group.device)
    for start in range(0, -(-len(sequences) // group.layout.data), size):
        micro = own[start : start + size]
        loss = engine.loss_of((micro if len(micro) else sequences[:1]).to(group.device))
        total += torch.stack([loss.double(), total.new_ones(())]) * weight_of(micro)
    if group.layout.replicas > 1:
        dist.all_reduce(total, group=group.replica_group)
    return float(total[0] / total[1])


def _blocks(config: RunConfig, run: RunDir, domain: str) -> torch.Tensor:
    """Return complete sequences of a domain's dev text with their last targets: int64 [count, length + 1].

    Conversations are packed, and have the flags of `data/chat/packing.py`.
    """
    length = config.budget.sequence_length
    text = EvaluationText.load(run, domain, "dev", tokens=config.dev_loss.tokens, sequence_length=length)
    if text.counted is not None:
        return torch.as_tensor(text.sequences(length))
    tokens = torch.as_tensor(text.tokens)
    count = (len(tokens) - 1) // length
    if count == 0:
        return tokens.new_empty(0, length + 1)
    return tokens[: count * length + 1].unfold(0, length + 1, length)
