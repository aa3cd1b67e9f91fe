"""Which mixture of experts a recipe makes of a run's experts: its experts, its shape and its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError, unknown_name
from btm_scale.forest.expert import Expert, Parent, read_expert
from btm_scale.forest.forest import require_experts
from btm_scale.forest.routers import ROUTED, ROUTERS, domains_of_expert
from btm_scale.model.hf_config import read_shape
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import MOE, RunDir, finished_models


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


def shape_of_mixture(config: RunConfig, run: RunDir, names: Sequence[str], recipe: Recipe) -> ModelShape:
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


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return what the card of a mixture records of its recipe."""
    settings: dict[str, Any] = {"top_k": recipe.top_k, "router": recipe.router}
    settings |= {"random_seed": recipe.random_seed} if recipe.router == "random" else {}
    return settings | ({} if recipe.shared_expert is None else {"shared_expert": recipe.shared_expert})


def shared_directory(run: RunDir, recipe: Recipe) -> Path | None:
    """Return the directory of the model that computes every token, or None."""
    return None if recipe.shared_expert is None else run.model(recipe.shared_expert)


def card_of_mixture(
    run: RunDir, names: Sequence[str], settings: Mapping[str, Any], shared_expert: str | None
) -> Expert:
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
