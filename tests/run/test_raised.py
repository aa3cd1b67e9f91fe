"""A budget that is raised while some models have not begun."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError
from btm_scale.forest.branch import Branch
from btm_scale.run import grow
from btm_scale.run.state import as_recorded, open_run
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


@pytest.fixture
def raised_run(tmp_path: Path) -> RunDir:
    """A run whose two experts were trained with half of its budget first."""
    run = RunDir(tmp_path / "run")
    values = tiny_values(tmp_path, novel_domains={}, baselines={"dense": False})
    open_run(write_config(tmp_path / "run.yaml", values), run)
    for model in ("seed", "python", "licences"):
        (run.checkpoints(model) / "step-00000012").mkdir(parents=True)
    open_run(RunConfig.load(tmp_path / "run.yaml", (f"budget.tokens={48 * 1024}",)), run)
    return run


def test_an_expert_that_is_added_to_a_raised_run_trains_as_if_the_whole_budget_were_given_at_once(
    raised_run: RunDir, tmp_path: Path
) -> None:
    text = tmp_path / "law.jsonl"
    values = tiny_values(tmp_path, novel_domains={}, added_domains={"law": {"text": str(text)}})
    values |= {"baselines": {"dense": False}, "budget": values["budget"] | {"tokens": 48 * 1024}}
    grown = open_run(write_config(tmp_path / "grown.yaml", values), raised_run)
    once = RunConfig.load(tmp_path / "grown.yaml", (f"budget.seed_budget={24 * 1024}",))
    assert training_job(grown, "law") == training_job(once, "law")
    assert len(training_job(grown, "python").earlier) == 1
    # Its first budget stays the same once it has begun, and is a former one when the budget is raised again.
    (raised_run.checkpoints("law") / "step-00000003").mkdir(parents=True)
    again = open_run(RunConfig.load(raised_run.config, (f"budget.tokens={96 * 1024}",)), raised_run)
    assert [len(training_job(again, name).earlier) for name in ("law", "python")] == [1, 2]


def test_a_branch_of_a_raised_run_records_its_first_budget(
    raised_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that another program starts reads run.yaml as it is."""
    monkeypatch.setattr(grow, "prepare", lambda config, run: None)
    monkeypatch.setattr(grow, "decide", lambda config, run, name, branch, weights: Branch(parents=(), domains={}))
    grow.branch_expert(RunConfig.load(raised_run.config), raised_run, "law", "seed", text=[tmp_path / "law.jsonl"])
    assert training_job(RunConfig.load(raised_run.config), "law").earlier == ()


def test_an_expert_that_is_trained_anew_after_its_removal_has_no_former_budget(raised_run: RunDir) -> None:
    (raised_run.checkpoints("python") / "step-00000012").rmdir()
    config = open_run(RunConfig.load(raised_run.config), raised_run)
    assert [len(training_job(config, name).earlier) for name in ("python", "licences")] == [0, 1]


def test_a_rank_of_another_program_trains_with_the_budgets_that_the_run_records(
    raised_run: RunDir, tmp_path: Path
) -> None:
    def of_rank(tokens: int) -> RunConfig:
        return as_recorded(RunConfig.load(tmp_path / "run.yaml", (f"budget.tokens={tokens}",)), raised_run)

    for model in ("seed", "python"):
        assert training_job(of_rank(48 * 1024), model) == training_job(RunConfig.load(raised_run.config), model)
    with pytest.raises(ConfigError, match=r"has not recorded this budget.* btm-scale prepare CONFIG --out"):
        of_rank(96 * 1024)
