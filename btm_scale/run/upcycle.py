"""The forest as one model: a mixture of experts, whose experts are the MLPs of the forest's."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from btm_scale.checkpoint.merge.compatibility import promoted_dtype
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.merge.moe import Ingredients
from btm_scale.checkpoint.merge.planning import make_plan
from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError, ForestError, unknown_name
from btm_scale.forest.expert import CARD, Expert, Parent, find_expert, read_expert
from btm_scale.forest.forest import require_experts
from btm_scale.forest.routed_router import fitted_routed
from btm_scale.forest.router import ROUTED, ROUTERS, gates
from btm_scale.forest.router_sums import domains_of_expert, router_sums, texts_of_expert
from btm_scale.forest.scores import with_sorted_header
from btm_scale.forest.shared_tensors import share_the_rest
from btm_scale.forest.turns import current_config, evaluating, scoring, using
from btm_scale.model.hf_config import read_shape
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import MOE, RunDir, finished_models
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_directory, publish_directory, write_file
from btm_scale.util.locks import held
from btm_scale.util.provenance import NAME as PROVENANCE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Which experts a mixture is made of (default: all), how many compute a token, and how its router is made.

    The MLPs of the model `shared_expert` compute every token too; None: of no model.
    """

    experts: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    top_k: int = 2
    router: str = ROUTED
    random_seed: int = 0
    shared_expert: str | None = None


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
    with using(run), held(run.upcycle_lock) as is_ours:
        if not is_ours:
            raise ForestError(f"Another process makes the mixture of experts of {run.root}. Wait for it, or stop it.")
        config = current_config(config, run)
        _require_untrained(run)
        made = make_mixture(config, run, recipe, run.model(MOE), device=device, jobs=jobs)
        with scoring(run):
            score_models(config, run, [MOE])
        return made


def _require_untrained(run: RunDir) -> None:
    former = find_expert(run.model(MOE))
    if former is not None and former.joint_steps:
        raise ForestError(
            f"{run.model(MOE)} was trained jointly for {former.joint_steps:,} steps, and upcycle would replace it by a "
            "mixture that is not trained. Move it out of the run first, or train another one: btm-scale run CONFIG"
        )


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
    device: str = "cpu",
    jobs: int | None = None,
) -> Upcycled:
    """Make a mixture of experts at `final`, unless that is the same already. `before` is called when it is not.

    `settings` are recorded in its card, by default the recipe's. Raises ForestError as `upcycle` does.
    """
    names = chosen_experts(run, recipe)
    shape = _mixture_shape(config, run, names, recipe)
    card = _card(run, names, settings or _settings(recipe), recipe.shared_expert)
    former = find_expert(final)
    is_complete = former is not None and former.model_copy(update={"content_hash": ""}) == card
    if not is_complete:
        _require_mergeable(run, names, recipe)
        shared = share_the_rest(run, {name: read_expert(run.model(name)) for name in names})
        before()
        _make(config, run, card, shape, recipe, final, shared, device, jobs)
    return Upcycled(read_expert(final), shape, is_complete)


def chosen_experts(run: RunDir, recipe: Recipe) -> list[str]:
    """Return the experts of a recipe, sorted. Raises ForestError for an unknown one, and for fewer than two."""
    forest = list(require_experts(run))
    for name in (*recipe.experts, *recipe.without):
        if name not in forest:
            raise ForestError(unknown_name("expert", name, forest))
    names = [name for name in forest if name in (recipe.experts or forest) and name not in recipe.without]
    if len(names) < 2:
        raise ForestError(
            f"{', '.join(names) or 'No expert'} is left of {', '.join(forest)}. A mixture needs at least two experts: "
            "name more with --experts, or leave out fewer with --without."
        )
    return names


def _mixture_shape(config: RunConfig, run: RunDir, names: Sequence[str], recipe: Recipe) -> ModelShape:
    """Return the shape of the mixture. Raises ForestError if the experts make none."""
    if (run.experts / MOE).is_dir() or MOE in config.all_domains:
        raise ForestError(
            f"{run.root} has an expert or a domain called '{MOE}', which is the name of a run's mixture. Merge the "
            "experts outside of the run: btm-scale merge OUT A B --method moe"
        )
    if recipe.router not in ROUTERS:
        raise ForestError(unknown_name("router", recipe.router, ROUTERS))
    models = [*names, *([recipe.shared_expert] if recipe.shared_expert is not None else [])]
    if recipe.shared_expert is not None and recipe.shared_expert not in finished_models(run):
        raise ForestError(f"--shared-expert: {unknown_name('model', recipe.shared_expert, finished_models(run))}")
    shapes = {name: read_shape(run.model(name)) for name in models}
    first = names[0]
    if other := next((name for name in models if shapes[name] != shapes[first]), None):
        differing = ", ".join(
            f"{field} {getattr(shapes[first], field)} and {getattr(shapes[other], field)}"
            for field in ModelShape.model_fields
            if getattr(shapes[first], field) != getattr(shapes[other], field)
        )
        raise ForestError(
            f"'{first}' and '{other}' have different shapes: {differing}. The experts of a mixture have one shape. "
            + (f"Leave one out: --without {other}" if other in names else "Use another shared expert, or none.")
        )
    if not 1 <= recipe.top_k <= len(names):
        raise ForestError(
            f"--top-k is {recipe.top_k}, and there are {len(names)} experts. A token is computed by at least 1 and at "
            "most all of them: change it."
        )
    try:
        shape = shapes[first].mixture(len(names), recipe.top_k, shared_expert=recipe.shared_expert is not None)
    except ValueError as error:
        raise ForestError(str(error)) from None
    if recipe.router != "random":
        for name in names:
            domains_of_expert(config, run, name)
    return shape


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
            ingredients=Ingredients(tuple(names), shared_expert=_shared_expert(run, recipe)),
        )
    except CheckpointError as error:
        raise ForestError(str(error)) from None


def _settings(recipe: Recipe) -> dict[str, Any]:
    settings: dict[str, Any] = {"top_k": recipe.top_k, "router": recipe.router}
    settings |= {"random_seed": recipe.random_seed} if recipe.router == "random" else {}
    return settings | ({} if recipe.shared_expert is None else {"shared_expert": recipe.shared_expert})


def _shared_expert(run: RunDir, recipe: Recipe) -> Path | None:
    return None if recipe.shared_expert is None else run.model(recipe.shared_expert)


def _card(run: RunDir, names: Sequence[str], settings: Mapping[str, Any], shared_expert: str | None) -> Expert:
    """Return the card of a mixture, without its hash."""
    read = dict.fromkeys([*names, *([shared_expert] if shared_expert is not None else [])])
    return Expert(
        name=MOE,
        domains={},
        parents=tuple(Parent(name, 1 / len(names)) for name in names),
        tokens=0,
        steps=0,
        layout=dict(settings),
        data_fingerprint={name: read_expert(run.model(name)).content_hash for name in read},
        content_hash="",
    )


def _make(
    config: RunConfig,
    run: RunDir,
    card: Expert,
    shape: ModelShape,
    recipe: Recipe,
    final: Path,
    shared: bool,
    device: str,
    jobs: int | None,
) -> None:
    """Write the mixture beside the former one, and put it in its place."""
    names = [parent.name for parent in card.parents]
    directories = [run.model(name) for name in names]

    def merged(output: Path, router: Path | None) -> str:
        report = merge(
            output,
            [(directory, 1.0) for directory in directories],
            method="moe",
            parameters={"top_k": recipe.top_k},
            dtype=promoted_dtype(directories),
            jobs=jobs,
            random_seed=recipe.random_seed,
            ingredients=Ingredients(tuple(names), router, shared, shared_expert=_shared_expert(run, recipe)),
        )
        return report.content_hash

    router = None
    if recipe.router == ROUTED:
        unrouted = final.with_name(f".{final.name}.unrouted")
        shutil.rmtree(unrouted, ignore_errors=True)
        try:
            merged(unrouted, None)
            logger.info("fitting the router to the mixture, layer by layer")
            texts = [texts_of_expert(config, run, name) for name in names]
            router = _write_gates(run, fitted_routed(unrouted, shape, texts, device))
        finally:
            shutil.rmtree(unrouted, ignore_errors=True)
    elif recipe.router != "random":
        router = _write_gates(run, _gates(config, run, names, shape, recipe.router, device))
    new = final.with_name(f".{final.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # complete, but its process was killed before it got its name
    logger.info("merging %s into one mixture of experts", ", ".join(names))
    content_hash = merged(new, router)
    try:
        with writing(final):
            (new / PROVENANCE).unlink(missing_ok=True)  # expert.json is the record of a model in a run
            card.model_copy(update={"content_hash": content_hash}).write(new / CARD)
            with evaluating(run):  # which reads the former one
                publish_directory(new, final, replace=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _gates(
    config: RunConfig, run: RunDir, names: Sequence[str], shape: ModelShape, kind: str, device: str
) -> dict[str, Tensor]:
    """Return the gates of a router that is made of each expert's own sums."""
    sums = []
    for name in names:
        logger.info("reading the hidden states of %s on its domains' dev text", name)
        sums.append(router_sums(config, run, name, device=device))
    return gates(kind, shape, sums)


def _write_gates(run: RunDir, tensors: dict[str, Tensor]) -> Path:
    """Write the router of a mixture to a file, unless it has the same bytes already; returns its path."""
    path, content = run.router(MOE), with_sorted_header(save(tensors))
    if not path.is_file() or path.read_bytes() != content:  # an interrupted merge resumes if the file is the same
        make_directory(path.parent)
        write_file(path, content)
    return path
