"""A merge that is planned from its arguments or from a recipe, with what is recorded of it in the output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.formats.based import is_completed, with_base
from btm_scale.checkpoint.merge.moe import Ingredients, names_of
from btm_scale.checkpoint.merge.moe_recipe import MoeRecipe, is_moe_recipe, moe_recipe
from btm_scale.checkpoint.merge.plan import MergePlan
from btm_scale.checkpoint.merge.planning import make_plan
from btm_scale.checkpoint.merge.recipe import Extras, load_recipe, recipe_of, recipe_values
from btm_scale.checkpoint.merge.recipe_plan import local_models, make_recipe_plan
from btm_scale.checkpoint.merge.record import chosen_template, provenance
from btm_scale.checkpoint.merge.vocabulary import NEW_ROWS
from btm_scale.errors import CheckpointError, unknown_name
from btm_scale.util.provenance import Provenance


@dataclass(frozen=True)
class Planned:
    """A plan and what is recorded of it.

    `inputs` are the models with their weights in the order in which they were given, `recipe` is the recipe's YAML, and
    `template` the chat template, if not that of an input.
    """

    plan: MergePlan
    inputs: tuple[tuple[Path, float], ...]
    recipe: str | None
    dtype: str | None
    template: str | None

    def provenance(self, output: Path) -> Provenance:
        """Return the record of the merge into `output`, without its answer. Bases are the last inputs."""
        return provenance(self.plan, output, self.inputs, self.dtype, self.template, self.recipe)


def by_arguments(
    inputs: Sequence[tuple[Path, float]],
    *,
    method: str,
    parameters: Mapping[str, float] | None,
    base: Path | None,
    dtype: str | None,
    max_shard_bytes: float,
    random_seed: int,
    chat_template: str | Path | None,
    tokenizer: str | Path | None,
    new_rows: str,
    allow: Sequence[str],
    with_recipe: bool,
    ingredients: Ingredients | None,
) -> Planned:
    """Plan a merge from the arguments of `merge`. Raises `CheckpointError` that lists every problem."""
    if new_rows not in NEW_ROWS:
        raise CheckpointError(unknown_name("kind of new rows", new_rows, NEW_ROWS))
    paths = local_models([*(path for path, _ in inputs), *([base] if base else [])])
    origin = paths[str(base)] if base else None
    pairs = tuple((with_base(paths[str(path)], origin), float(weight)) for path, weight in inputs)
    if method == "moe":
        with_recipe, ingredients = False, ingredients or Ingredients(names_of([path for path, _ in pairs]))
    elif ingredients is not None:
        raise CheckpointError(f"'{method}' has no router. Leave the router out, or use the method moe.")
    plan = make_plan(
        pairs,
        method=method,
        parameters=parameters,
        base=origin,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        seed=random_seed,
        tokenizer=tokenizer,
        new_rows=new_rows,
        allow=allow,
        ingredients=ingredients,
    )
    others = ingredients.others if ingredients is not None else []
    pairs += tuple((path, 0.0) for path in others if path not in dict(pairs))
    template = chosen_template(chat_template, origin, pairs)
    completed = base is not None and any(is_completed(path) for path, _ in pairs)
    extras = Extras(
        random_seed=random_seed,
        max_shard_bytes=max_shard_bytes,
        adapter_base=str(base) if completed else None,
        chat_template=str(chat_template) if chat_template is not None else None,
        new_rows="zero" if new_rows == "zero" else "mean",
        allow=list(allow),
    )
    if not with_recipe:
        return Planned(plan, pairs, None, dtype, template)
    recipe = recipe_of(
        [(str(path), float(weight)) for path, weight in inputs],
        method=method,
        parameters=plan.parameters,
        base=str(base) if base and plan.base else None,
        dtype=dtype,
        tokenizer=str(tokenizer) if tokenizer is not None else None,
        extras=extras,
    )
    return Planned(plan, pairs, recipe.text(), dtype, template)


def by_recipe(file: Path, *, dtype: str | None, random_seed: int | None, max_shard_bytes: float | None) -> Planned:
    """Plan a merge by a recipe; what is not None replaces the recipe's. Raises `CheckpointError` with every problem."""
    values = recipe_values(Path(file))
    given = moe_recipe(Path(file), values) if is_moe_recipe(values) else load_recipe(Path(file))
    changes = {"random_seed": random_seed, "max_shard_bytes": max_shard_bytes}
    extras = given.btm_scale.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if isinstance(given, MoeRecipe):
        return _mixture_by_recipe(given.model_copy(update={"btm_scale": extras, **({"dtype": dtype} if dtype else {})}))
    types = {"dtype": dtype, "out_dtype": None} if dtype else {}
    recipe = given.model_copy(update={"btm_scale": extras, **types})
    plan, inputs = make_recipe_plan(recipe)
    base = recipe.base_model or extras.adapter_base
    template = chosen_template(extras.chat_template, local_models([base])[base] if base else None, inputs)
    return Planned(plan, inputs, recipe.text(), recipe.output_dtype, template)


def _mixture_by_recipe(recipe: MoeRecipe) -> Planned:
    paths, extras = local_models(recipe.model_names), recipe.btm_scale
    experts, base = [paths[expert.source_model] for expert in recipe.experts], paths[recipe.base_model]
    inputs = [(path, 1.0) for path in experts]
    plan = make_plan(
        inputs,
        method="moe",
        parameters={"top_k": recipe.experts_per_token},
        base=None,
        dtype=recipe.dtype,
        max_shard_bytes=extras.max_shard_bytes,
        seed=extras.random_seed,
        allow=extras.allow,
        ingredients=recipe.ingredients(paths),
    )
    if base not in experts:
        inputs.append((base, 0.0))
    template = chosen_template(extras.chat_template, base, inputs)
    return Planned(plan, tuple(inputs), recipe.text(), recipe.dtype, template)
