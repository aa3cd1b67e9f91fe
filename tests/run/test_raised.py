"""A budget that is raised while some models have not begun."""

from __future__ import annotations

from pathlib import Path

from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job


def test_a_model_that_has_not_begun_takes_the_steps_of_the_raised_budget_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    open_run(write_config(tmp_path / "run.yaml", tiny_values(tmp_path, novel_domains={})), run)

    def raised(tokens: int) -> RunConfig:
        return open_run(RunConfig.load(tmp_path / "run.yaml", (f"budget.tokens={tokens}",)), run)

    def earlier(config: RunConfig) -> dict[str, int]:
        return {name: len(training_job(config, name).earlier) for name in ("dense", "python", "licences")}

    for model in ("seed", "python"):
        (run.checkpoints(model) / "step-00000012").mkdir(parents=True)
    once = raised(48 * 1024)
    assert earlier(once) == {"dense": 0, "python": 1, "licences": 0}
    assert training_job(once, "licences").steps == training_job(once, "python").steps
    for model in ("python", "licences"):
        (run.checkpoints(model) / "step-00000024").mkdir(parents=True)
    assert earlier(raised(96 * 1024)) == {"dense": 0, "python": 2, "licences": 1}
    assert earlier(RunConfig.load(run.config)) == {"dense": 0, "python": 2, "licences": 1}
