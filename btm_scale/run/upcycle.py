"""The forest as one model: a mixture of experts, whose experts are the MLPs of the forest's."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.merge.compatibility import promoted_dtype
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.moe import ComputedRouter, Ingredients
from btm_scale.checkpoint.merge.planning import make_plan
from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError, ForestError, WorkerLost
from btm_scale.forest.expert import CARD, Expert, find_expert, read_expert
from btm_scale.forest.nonfinite import nonfinite_models
from btm_scale.forest.routers import ROUTED
from btm_scale.forest.shared_tensors import share_the_rest
from btm_scale.forest.turns import current_config, evaluating, making_mixture, scoring, using
from btm_scale.model.shape import ModelShape
from btm_scale.run import mixture_leftovers
from btm_scale.run.mixture_leftovers import new_path, unrouted_path
from btm_scale.run.mixture_recipe import (
    Recipe,
    card_of_mixture,
    chosen_experts,
    settings_of,
    shape_of_mixture,
    shared_directory,
)
from btm_scale.run_dir import MOE, RunDir
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import publish_directory
from btm_scale.util.provenance import NAME as PROVENANCE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upcycled:
    """The mixture of a run, and whether an earlier call had made it."""

    card: Expert
    shape: ModelShape
    is_complete: bool


def upcycle(
    config: RunConfig, run: RunDir, recipe: Recipe, *, device: str = "cpu", jobs: int | None = None
) -> Upcycled:
    """Make the mixture of experts of a run, replacing a former one, and score it on every domain.

    No expert is removed meanwhile. Raises ForestError, before anything is written, if the experts make no mixture,
    another process makes one, or the run's mixture was trained.
    """

    def require_untrained() -> None:
        former = find_expert(run.model(MOE))
        if former is not None and former.joint_steps:
            raise ForestError(
                f"{run.model(MOE)} was trained jointly for {former.joint_steps:,} steps, and upcycle would replace it "
                "by a mixture that is not trained. Move it out of the run first, or train another one: btm-scale run "
                "CONFIG"
            )

    with using(run), making_mixture(run):
        config = current_config(config, run)
        made = make_mixture(
            config, run, recipe, run.model(MOE), may_replace=require_untrained, device=device, jobs=jobs
        )
        with scoring(run):
            score_models(config, run, [MOE])
        return made


def score_models(config: RunConfig, run: RunDir, models: Sequence[str]) -> None:
    """Score models of a run as the pipeline does. Its engine is imported here, so that merging needs less memory."""
    from btm_scale.run import pipeline

    pipeline.score_models(config, run, models)


def make_mixture(
    config: RunConfig,
    run: RunDir,
    recipe: Recipe,
    final: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    before: Callable[[], None] = lambda: None,
    may_replace: Callable[[], None] = lambda: None,
    device: str = "cpu",
    jobs: int | None = None,
) -> Upcycled:
    """Make a mixture of experts at `final`, unless that is the same already. `before` is called when it is not.

    `settings` are recorded in its card, by default the recipe's. `may_replace` raises if the former mixture must stay;
    it is called first and, in case that was made meanwhile, before it is replaced. The caller holds the lock of
    `making_mixture`. Raises ForestError as `upcycle` does.
    """
    may_replace()
    names = chosen_experts(run, recipe)
    shape = shape_of_mixture(config, run, names, recipe)
    card = card_of_mixture(run, names, settings or settings_of(recipe), recipe.shared_expert)
    former = find_expert(final)
    is_complete = former is not None and former.model_copy(update={"content_hash": ""}) == card
    if not is_complete:
        _require_mergeable(run, names, recipe)
        shared = share_the_rest(run, {name: read_expert(run.model(name)) for name in names})
        before()
        mixture_leftovers.begin(final, card)
        try:
            _make(config, run, card, shape, recipe, final, shared, may_replace, device, jobs)
        except WorkerLost:  # the merge resumes
            raise
        except Exception:
            mixture_leftovers.remove(final)
            raise
    mixture_leftovers.remove(final)
    return Upcycled(read_expert(final), shape, is_complete)


def _require_mergeable(run: RunDir, names: Sequence[str], recipe: Recipe) -> None:
    """Raise ForestError with every problem that the merge would report, before any text is read."""
    directories = [run.model(name) for name in names]
    try:
        make_plan(
            [(directory, 1.0) for directory in directories],
            method="moe",
            parameters={"top_k": recipe.top_k},
            base=None,
            dtype=promoted_dtype(directories),
            max_shard_bytes=float("inf"),
            seed=0,
            ingredients=Ingredients(tuple(names), shared_expert=shared_directory(run, recipe)),
        )
    except CheckpointError as error:
        raise ForestError(str(error)) from None


def _make(
    config: RunConfig,
    run: RunDir,
    card: Expert,
    shape: ModelShape,
    recipe: Recipe,
    final: Path,
    shared: bool,
    may_replace: Callable[[], None],
    device: str,
    jobs: int | None,
) -> None:
    """Write the mixture beside the former one, and put it in its place."""
    names = [parent.name for parent in card.parents]
    directories = [run.model(name) for name in names]

    def merged(output: Path, router: Path | ComputedRouter | None) -> str:
        report = merge(
            output,
            [(directory, 1.0) for directory in directories],
            method="moe",
            parameters={"top_k": recipe.top_k},
            dtype=promoted_dtype(directories),
            jobs=jobs,
            random_seed=recipe.random_seed,
            ingredients=Ingredients(tuple(names), router, shared, shared_expert=shared_directory(run, recipe)),
        )
        if report.nonfinite:
            raise ForestError(_not_numbers(run, names, recipe))
        return report.content_hash

    router: Path | ComputedRouter | None = None
    if recipe.router != "random":
        from btm_scale.run import mixture_router  # imports torch, which takes as long as much of a merge
    if recipe.router == ROUTED:
        unrouted = unrouted_path(final)
        shutil.rmtree(unrouted, ignore_errors=True)
        try:
            merged(unrouted, None)
            router = mixture_router.write_routed_router(config, run, names, shape, unrouted, device)
        finally:
            shutil.rmtree(unrouted, ignore_errors=True)
    elif recipe.router != "random":
        router = mixture_router.router_of_sums(config, run, names, shape, recipe.router, device)
    new = new_path(final)
    shutil.rmtree(new, ignore_errors=True)  # complete, but its process was killed before it got its name
    logger.info("merging %s into one mixture of experts", ", ".join(names))
    content_hash = merged(new, router)
    try:
        with writing(final):
            (new / PROVENANCE).unlink(missing_ok=True)  # expert.json is the record of a model in a run
            card.model_copy(update={"content_hash": content_hash}).write(new / CARD)
            with evaluating(run):  # which reads the former one
                may_replace()
                publish_directory(new, final, replace=True)
    except BaseException:
        mixture_leftovers.remove(final)
        raise


def _not_numbers(run: RunDir, names: Sequence[str], recipe: Recipe) -> str:
    """Return why a mixture would have NaN or infinities."""
    diverged = nonfinite_models(run, dict.fromkeys([*names, *([recipe.shared_expert] if recipe.shared_expert else [])]))
    remedy = " ".join(f"--without {name}" for name in diverged if name in names) or "another --shared-expert"
    return (
        f"The weights of {', '.join(diverged)} have NaN or infinities, and so would the mixture. Check how they were "
        f"trained, or leave them out: {remedy}"
    )
