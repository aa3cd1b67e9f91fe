"""Estimate the cost of `btm-scale mixture`: averages, tokens, disk space and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from btm_scale.evaluate.ablate import Text
from btm_scale.evaluate.mixture_runs import Mixture, unmeasured
from btm_scale.forest.expert import read_expert
from btm_scale.run_dir import RunDir
from btm_scale.train.metrics import read_metrics
from btm_scale.util.device_query import name_of

_FORWARD = 3.0  # tokens that are scored in the time of one that is trained on: a forward pass is a third of a step
_LAST_STEPS = 50


@dataclass(frozen=True)
class Cost:
    """The cost of measuring mixtures. `seconds`: None if no model of the run was trained on such a device."""

    runs: int
    to_measure: int
    tokens: int
    disk_bytes: int  # of the one average that is on disk at a time
    seconds: float | None

    def document(self) -> dict[str, int | float | None]:
        """Return the cost as a JSON object."""
        return {
            "runs": self.runs,
            "to_measure": self.to_measure,
            "tokens": self.tokens,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
        }


def mixture_cost(run: RunDir, texts: Mapping[str, Text], mixtures: Sequence[Mixture], device: str) -> Cost:
    """Return the cost of measuring those mixtures that evaluation/mixture.json lacks. It reads no weights.

    The time is that of scoring, at the speed at which the models were trained; merging takes little beside it.
    """
    missing = unmeasured(run, texts, mixtures)
    tokens = sum(len(text.tokens) - 1 for _, lacking in missing for text in lacking.values())
    names = sorted({name for mixture in mixtures for name in mixture})
    speed = _scored_per_second(run, names, name_of(torch.device(device)))
    largest = max(
        (sum(file.stat().st_size for file in run.model(name).glob("*.safetensors")) for name in names), default=0
    )
    return Cost(len(mixtures), len(missing), tokens, largest, tokens / speed if speed else None)


def _scored_per_second(run: RunDir, names: Sequence[str], device: str) -> float | None:
    """Return scored tokens/s of one process, from the models' training on such a device; None if there was none."""
    speeds = []
    for name in names:
        rows = [row for row in read_metrics(run.metrics(name))[-_LAST_STEPS:] if row.get("device") == device]
        taken = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second", 0) > 0]
        if taken:
            layout = read_expert(run.model(name)).layout
            ranks = max(1, math.prod(int(layout.get(axis, 1)) for axis in ("tensor", "context", "data")))
            speeds.append(_FORWARD * statistics.median(taken) / ranks)
    return statistics.median(speeds) if speeds else None
