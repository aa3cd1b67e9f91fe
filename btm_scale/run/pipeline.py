"""The stages of a run in order; each skips what is already completed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError, GroupFailed, first_few
from btm_scale.evaluate.averages import are_finished
from btm_scale.evaluate.evaluate import evaluate
from btm_scale.evaluate.readiness import require_evaluable
from btm_scale.evaluate.results import Results
from btm_scale.forest.abandoned import remove_abandoned
from btm_scale.forest.average_models import average_texts
from btm_scale.forest.expert import is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.membership import Added, adding
from btm_scale.forest.scores import Scores, all_texts, missing_scores
from btm_scale.forest.turns import current_config, evaluating, scoring, using
from btm_scale.launch.supervise import GroupCommand, RunGroups
from btm_scale.run.launchers import Progress, here, placement, run_training
from btm_scale.run.preparing import prepare_run
from btm_scale.run.stages import EVALUATE, as_stage
from btm_scale.run.state import is_done, open_run
from btm_scale.run_dir import MOE, SEED, RunDir
from btm_scale.train.jobs import is_trained, model_names, training_stages
from btm_scale.train.passes import passes_of_run, require_few_passes
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.locks import held

logger = logging.getLogger(__name__)


def run_all(
    config: RunConfig,
    run: RunDir,
    *,
    on_progress: Progress,
    launcher: RunGroups | None = None,
    reread: Callable[[], RunConfig] | None = None,
) -> Results:
    """Run every stage that is not done, from text to page, and return the results.

    Groups run on this machine by default. Until it ends, no expert is removed from the forest.
    `reread`: as in `open_run`.

    Raises GroupFailed while another process runs the stages in this folder.
    """
    config = open_run(config, run, trains_here=launcher is None, reread=reread)
    with held(run.run_lock) as is_ours:
        if not is_ours:
            raise GroupFailed(
                f"Another process runs the stages in {run.root}. Follow it with: btm-scale status {run.root} --watch. "
                "To start again, stop it first."
            )
        with using(run):
            return _run_stages(config, run, on_progress, launcher)


def _run_stages(config: RunConfig, run: RunDir, on_progress: Progress, launcher: RunGroups | None) -> Results:
    logger.info("preparing token files")
    prepare_run(config, run)
    require_few_passes(config, passes_of_run(config, run))
    # Finished models have no scores on domains that were added since.
    finished = [*model_names(config), *added_experts(config, run)]
    finished = [model for model in finished if is_finished(run.model(model))]
    if finished:
        with scoring(run):
            score_models(config, run, finished, launcher)
    for stage in training_stages(config):
        todo = [model for model in stage if not is_done(config, run, model)]
        if todo:
            logger.info("training %s", ", ".join(todo))
        run_training(config, run, stage, on_progress=on_progress, launcher=launcher)
    config = config.with_precisions_of(RunConfig.load(run.config))  # where the first group has resolved it
    with evaluating(run):
        return evaluate_forest(config, run, launcher)


def evaluate_forest(config: RunConfig, run: RunDir, launcher: RunGroups | None = None) -> Results:
    """Evaluate every method, after merging and scoring the averages that are missing; returns the results.

    The caller holds the lock of `evaluating`, so that neither the forest nor its scores change.
    """
    require_evaluable(config, run)  # raised before anything is written
    remove_abandoned(config, run)
    finished = [model for model in model_names(config) if model != MOE and is_finished(run.model(model))]
    if behind := [model for model in finished if not is_trained(config, run, model)]:
        logger.warning(
            "trained with a former budget: %s. btm-scale run CONFIG trains further", first_few(behind, "models")
        )
    with as_stage(run, EVALUATE):
        score_averages(config, run, launcher)
        if is_finished(run.model(MOE)):
            score_models(config, run, [MOE], launcher)  # made before a domain was added
        return evaluate(config, run)


def add_to_forest(config: RunConfig, run: RunDir, source: Path, name: str) -> Added:
    """Score a model on every domain aside, and add it as an expert with its scores.

    Raises as `adding` and `score_models` do, and ForestError for a model whose scores are not numbers. The forest is as
    it was then.
    """

    def score(aside: str) -> None:
        grown = current_config(config, run)
        with scoring(run):
            score_models(grown, run, [aside])
        for domain, split in all_texts(grown):
            path = run.scores(aside, domain, split)
            if path.is_file() and not np.isfinite(Scores.load(path).log_probs).all():
                raise ForestError(
                    f"{source} gives probabilities that are not numbers on the {split} text of {domain}. Its weights "
                    "have NaN or infinities. Check how they were saved."
                )

    with adding(config, run, source, name, score) as added:
        score_models(current_config(config, run), run, [name])  # those of a model that was there before
    return added


def score_models(config: RunConfig, run: RunDir, models: Sequence[str], launcher: RunGroups | None = None) -> list[str]:
    """Score the models (default: every finished one) that have missing scores; returns their names.

    The caller holds the lock of `scoring`, so that no model is removed meanwhile. Raises ForestError if one of the
    models is not finished, or if there is no finished model.
    """
    remove_abandoned(config, run)
    for model in models:
        read_expert(run.model(model))
    averages = average_texts(config)
    candidates = [*model_names(config), *added_experts(config, run), *averages, MOE]
    names = models or [name for name in dict.fromkeys(candidates) if is_finished(run.model(name))]
    if not names:
        raise ForestError(f"There is no finished model in {run.root}. Train some first: btm-scale run CONFIG")
    todo = [name for name in names if missing_scores(config, run, name, averages.get(name) or all_texts(config))]
    if todo:
        _run_scoring(config, run, tuple(part for name in todo for part in ("--model", name)), launcher)
    return todo


def added_experts(config: RunConfig, run: RunDir) -> list[str]:
    """Return the experts of the forest that this run's config does not train."""
    return [name for name in experts(run) if name not in config.expert_domains]


def score_averages(config: RunConfig, run: RunDir, launcher: RunGroups | None = None) -> None:
    """Merge the averages and score each on its domains, in one group; does nothing if none is missing.

    The caller holds the lock of `evaluating`. Raises ForestError as `require_evaluable` does, before a group starts.
    """
    require_evaluable(config, run)
    logger.info("merging and scoring the averages")
    if not are_finished(config, run):
        _run_scoring(config, run, ("--averages",), launcher)


def _run_scoring(config: RunConfig, run: RunDir, arguments: tuple[str, ...], launcher: RunGroups | None) -> None:
    """Start one group that runs `btm-scale score` on the run, with this config.

    run.yaml may have changed since the config was read: `branch` adds a domain without waiting for an evaluation.
    """
    layout = config.layout
    launcher = launcher or here(placement(config, [SEED]))
    with scratch_directory(run.root / "score") as folder:
        config.save(folder / run.config.name)
        words = ("score", str(run.root), *arguments, "--config", str(folder / run.config.name))
        launcher([GroupCommand("score", layout.ranks, words, run.log("score"), layout.colocated)], lambda states: None)
