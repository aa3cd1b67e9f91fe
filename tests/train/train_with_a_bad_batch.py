"""Train a run's seed LM; at one step, the weights become NaN once: `train_with_a_bad_batch.py SPEC.json`.

The spec has `run`, the run's folder, and `step`, the step of the bad batch (0: none).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec

from btm_scale.config.run import RunConfig
from btm_scale.run.worker import train_as_rank
from btm_scale.run_dir import RunDir
from btm_scale.train.engine import Engine
from btm_scale.train.step_result import StepResult


def poison(bad_step: int) -> None:
    """Make step number `bad_step` of this process corrupt the weights."""
    taken, step = [0], Engine.step

    def spoiled(self: Engine, *arguments: Any) -> StepResult:
        result = step(self, *arguments)
        taken[0] += 1
        if taken[0] != bad_step:
            return result
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(math.nan)
        return StepResult(math.nan, math.nan)

    Engine.step = spoiled  # type: ignore[method-assign]


def rank(folder: str, bad_step: int) -> None:
    run = RunDir(Path(folder))
    poison(bad_step)
    train_as_rank(RunConfig.load(run.config), run, "seed")


if __name__ == "__main__":
    spec = read_spec()
    fork_world(1, rank, spec["run"], spec["step"])
