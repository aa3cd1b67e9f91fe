"""A merge that is planned from its arguments or from a recipe, with what is recorded of it in the output."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.formats.tensors import dtype_name, parse_dtype
from btm_scale.checkpoint.merge.plan import MergePlan, make_plan
from btm_scale.checkpoint.merge.recipe import Extras, load_recipe, recipe_of
from btm_scale.checkpoint.merge.recipe_plan import local_models, make_recipe_plan
from btm_scale.checkpoint.merge.sidecars import shown_parameters
from btm_scale.util.provenance import Input, Provenance


@dataclass(frozen=True)
class Planned:
    """A plan, the models with their weights in the order in which they were given, the recipe's YAML and the dtype."""

    plan: MergePlan
    inputs: tuple[tuple[Path, float], ...]
    recipe: str | None
    dtype: str | None

    def provenance(self, output: Path) -> Provenance:
        """Return the record of the merge into `output`, without its answer. The base is the last input."""
        plan = self.plan
        read = {source.path for source in plan.sources}
        made_from = [Input.of(path, weight=weight, besides=output) for path, weight in self.inputs if path in read]
        if plan.base is not None:
            made_from.append(Input.of(plan.base.path, besides=output))
        settings = {
            "method": plan.method_name,
            "parameters": shown_parameters(plan),
            "dtype": dtype_name(parse_dtype(self.dtype)) if self.dtype else None,
            "max_shard_bytes": float(plan.max_shard_bytes),
            "seed": plan.seed,
        }
        if plan.tensors:
            settings["recipe"] = hashlib.sha256(str(self.recipe).encode()).hexdigest()
        return Provenance(command="merge", inputs=tuple(made_from), settings=settings, answer={})


def by_arguments(
    inputs: Sequence[tuple[Path, float]],
    *,
    method: str,
    parameters: Mapping[str, float] | None,
    base: Path | None,
    dtype: str | None,
    max_shard_bytes: float,
    random_seed: int,
    with_recipe: bool,
) -> Planned:
    """Plan a merge from the arguments of `merge`. Raises `CheckpointError` that lists every problem."""
    given = [(str(path), float(weight)) for path, weight in inputs]
    paths = local_models([*(name for name, _ in given), *([str(base)] if base else [])])
    pairs = tuple((paths[name], weight) for name, weight in given)
    plan = make_plan(
        pairs,
        method=method,
        parameters=parameters,
        base=paths[str(base)] if base else None,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        seed=random_seed,
    )
    recipe = recipe_of(
        given,
        method=method,
        parameters=plan.parameters,
        base=str(base) if base else None,
        dtype=dtype,
        extras=Extras(random_seed=random_seed, max_shard_bytes=max_shard_bytes),
    )
    return Planned(plan, pairs, recipe.text() if with_recipe else None, dtype)


def by_recipe(file: Path, *, dtype: str | None, random_seed: int | None, max_shard_bytes: float | None) -> Planned:
    """Plan a merge by a recipe; what is not None replaces the recipe's. Raises `CheckpointError` with every problem."""
    given = load_recipe(Path(file))
    changes = {"random_seed": random_seed, "max_shard_bytes": max_shard_bytes}
    extras = given.btm_scale.model_copy(update={key: value for key, value in changes.items() if value is not None})
    types = {"dtype": dtype, "out_dtype": None} if dtype else {}
    recipe = given.model_copy(update={"btm_scale": extras, **types})
    plan, inputs = make_recipe_plan(recipe)
    return Planned(plan, inputs, recipe.text(), recipe.output_dtype)
