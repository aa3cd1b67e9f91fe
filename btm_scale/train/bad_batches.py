"""Bad batches, which give a non-finite loss or a gradient spike: their step is undone, and they are skipped."""

from __future__ import annotations

import logging
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from btm_scale.config.training import HealthConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import CheckpointError, GroupFailed
from btm_scale.train.metrics import read_metrics
from btm_scale.util.records import Record

if TYPE_CHECKING:  # judging needs no engine
    from btm_scale.train.step_result import StepResult

logger = logging.getLogger(__name__)


class SkippedBatches(Record):
    """skipped.json: the batches that a model's training skipped."""

    ERROR = CheckpointError
    REMEDY = "Restore it from a copy, or delete {folder} and train the model again."

    batches: dict[int, str] = {}  # the problem, by step

    @classmethod
    def upgraded(cls, content: Any) -> Any:
        """Convert a file of the first version, which held only the problems by step."""
        return content if not isinstance(content, dict) or "batches" in content else {"batches": content}


class Health:
    """Checks every step, with the same verdict on every rank, and records skipped batches in `skipped.json`.

    A restart skips the same batches, so a run ends in the same weights however often it is interrupted. All ranks
    construct this object together, before the metrics are opened.
    """

    def __init__(self, group: ExpertGroup, config: HealthConfig, folder: Path, metrics: Path) -> None:
        self._config = config
        self._writes = group.is_first
        self._path = folder / "skipped.json"

        def history() -> tuple[dict[int, float], dict[int, str]]:
            rows = read_metrics(metrics)
            norms = {row["step"]: row["gradient_norm"] for row in rows if not row.get("overflowed")}
            return norms, _skipped_before(self._path)

        self._norms, self._skipped = group.decided(history)

    def leaves_out(self, step: int) -> bool:
        """Return whether the batch of this step is skipped."""
        return step in self._skipped

    def problem(self, step: int, result: StepResult) -> str | None:
        """Return what is wrong with the step just taken, or None.

        An overflow in fp16 is not a problem: dynamic loss scaling causes some.
        """
        if not math.isfinite(result.loss):
            return f"the loss is {result.loss}"
        if result.overflowed:
            return None
        if not math.isfinite(result.gradient_norm):
            return f"the gradient norm is {result.gradient_norm}"
        median = self._median(step)
        if self._config.spike is not None and median is not None:
            times = result.gradient_norm / median
            if times > self._config.spike:
                return f"the gradient norm {result.gradient_norm:.3g} is {times:.1f} times the recent median"
        self._norms[step] = result.gradient_norm
        return None

    def leave_out(self, step: int, problem: str) -> None:
        """Record a bad batch. Raises GroupFailed if there are more than the config allows."""
        self._skipped[step] = problem
        if self._writes:
            logger.warning("step %d: %s; restoring the state before it and skipping this batch", step, problem)
            SkippedBatches(batches=self._skipped).save(self._path)
        if len(self._skipped) > self._config.skips:
            raise GroupFailed(
                f"{len(self._skipped)} batches were bad, the last one at step {step}: {problem}. health.skips allows "
                f"{self._config.skips}. Lower optimizer.lr, or inspect the text of the steps in {self._path}."
            )
        dist.barrier()

    def _median(self, step: int) -> float | None:
        recent = [self._norms[i] for i in range(step - self._config.window, step) if i in self._norms]
        return statistics.median(recent) if len(recent) >= self._config.window // 2 else None


def _skipped_before(path: Path) -> dict[int, str]:
    """Return the batches that were skipped before; none if their record is damaged, since bad ones are found again."""
    try:
        return (SkippedBatches.find(path) or SkippedBatches()).batches
    except (CheckpointError, OSError) as error:
        logger.warning("%s No batch is skipped because of it; a bad one is undone again.", error)
        return {}
