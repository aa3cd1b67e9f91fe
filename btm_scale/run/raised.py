"""A raised budget: which models keep what they have, and from which step the others resume."""

from __future__ import annotations

from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, first_few
from btm_scale.forest.branch import has_begun
from btm_scale.forest.expert import is_finished, read_expert
from btm_scale.run_dir import MOE, SEED, RunDir
from btm_scale.train.jobs import TrainingJob, is_trained, model_names, training_job
from btm_scale.util.bounded_json import parse_json, read_bounded

RECORDED = ("seed_budget", "raised_from", "first_budgets")  # fields of the budget that the run itself records


def with_recorded_budgets(config: RunConfig, existing: RunConfig) -> RunConfig:
    """Return the config with the earlier budgets that the run has recorded, unless it sets them itself."""
    before, after = existing.budget, config.budget
    update = {
        "seed_budget": before.seed_budget if after.seed_budget is None else after.seed_budget,
        "raised_from": after.raised_from or before.raised_from,
        "first_budgets": after.first_budgets or before.first_budgets,
    }
    return config.model_copy(update={"budget": after.model_copy(update=update)})


def with_earlier_budgets(config: RunConfig, existing: RunConfig, run: RunDir) -> RunConfig:
    """Return the config with the budgets that models of the run were trained with before this one was raised.

    The seed LM keeps its budget once it has begun. Every other model that has begun takes the steps of each budget that
    any of them has begun to train with, so that these have the same schedule; one that has not begun, such as an expert
    that is added later, takes those of the raised budget alone.
    """
    before, after = existing.budget, config.budget
    update: dict[str, object] = {}
    if after.tokens > before.tokens:
        if before.seed_budget is None and (has_begun(run, SEED) or is_finished(run.model(SEED))):
            update["seed_budget"] = before.tokens
        if any(_has_entered(existing, run, model) for model in model_names(existing)):
            update["raised_from"] = (*before.raised_from, before.tokens)
    return with_first_budgets(config.model_copy(update={"budget": after.model_copy(update=update)}), run)


def with_first_budgets(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the config, if its budget was raised, with it as the first budget of each model that has not begun."""
    budget = config.budget
    late = [name for name in model_names(config) if name != SEED and not has_begun(run, name)]
    late = [name for name in late if not is_finished(run.model(name))]
    if not (budget.raised_from and late):
        return config
    first = budget.first_budgets | dict.fromkeys(late, budget.tokens)
    return config.model_copy(update={"budget": budget.model_copy(update={"first_budgets": first})})


def _has_entered(config: RunConfig, run: RunDir, model: str) -> bool:
    """Return whether a model other than the seed LM has taken steps that only the config's budget gives it."""
    if model == SEED:
        return False
    job = training_job(config, model)
    if not job.steps:  # with seed share 1; what the budget gives it is there once it is finished
        return is_finished(run.model(model))
    first = job.earlier[-1].steps if job.earlier else 0
    newest = max(map(_step, run.checkpoints(model).glob("step-*")), default=0)
    finished = read_expert(run.model(model)).steps if is_finished(run.model(model)) else 0
    return max(newest, finished) > first


def require_checkpoints(config: RunConfig, run: RunDir) -> None:
    """Raise ConfigError if a finished model is to be trained further and has no checkpoint to resume from."""
    lost = [
        model
        for model in model_names(config)
        if model != MOE  # it begins again with the experts' new weights
        and is_finished(run.model(model))
        and not is_trained(config, run, model)
        and resumes_at(run, training_job(config, model)) is None
    ]
    if lost:
        raise ConfigError(
            f"budget.tokens is raised, but the checkpoints of {first_few(lost, 'models')} are gone. The "
            f"added tokens need optimizer states. Restore {run.checkpoints(lost[0])}, or restore the former budget."
        )


def resumes_at(run: RunDir, job: TrainingJob) -> int | None:
    """Return the step from which a job resumes, by the names of its checkpoints; None if it has none.

    With wsd, a decay that ends before the job's last step is not part of its schedule.
    """
    checkpoints = run.checkpoints(job.model).glob("step-*")
    steps = [_step(path) for path in checkpoints if job.stable_steps is None or _decay_end(path) in (None, job.steps)]
    return max(steps, default=None)


def _step(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def _decay_end(path: Path) -> object:
    try:
        state = parse_json(read_bounded(path / "state.json"))
        return state.get("decay_end") if isinstance(state, dict) else -1
    except (OSError, ValueError):
        return -1
