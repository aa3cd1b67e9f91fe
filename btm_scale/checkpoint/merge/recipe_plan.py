"""Plan a merge by a recipe: every tensor with the weights and parameters that the recipe gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from btm_scale.checkpoint.formats.based import lacks_base, with_base
from btm_scale.checkpoint.formats.hub_cache import local_model
from btm_scale.checkpoint.formats.locate import described_config
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, parse_code
from btm_scale.checkpoint.merge.parameters import parameter_problems, weight_problems
from btm_scale.checkpoint.merge.plan import MergePlan, TensorMerge
from btm_scale.checkpoint.merge.planning import Models, Vocabulary, checked_models, make_plan
from btm_scale.checkpoint.merge.recipe import Recipe
from btm_scale.checkpoint.merge.recipe_layers import Place, full_places, origin_of_layers, stacked_specs
from btm_scale.checkpoint.merge.recipe_methods import SLERP
from btm_scale.checkpoint.merge.recipe_parameters import WEIGHT, Settings, interpolation, is_constant, parameters_of
from btm_scale.checkpoint.merge.registry import PerModel
from btm_scale.checkpoint.merge.stacking import stacked_config
from btm_scale.checkpoint.merge.towers import other_towers
from btm_scale.errors import CheckpointError

Inputs = tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class _Part:
    """A slice of a recipe, or all layers of its models, with the settings in their order of precedence."""

    models: tuple[str, ...]
    settings: tuple[tuple[Settings, ...], ...]  # of each model
    shared: tuple[Settings, ...]
    base: str | None


@dataclass(frozen=True)
class _Merged:
    """How one tensor is merged, by the models' names. `base` is the model and the name of its tensor."""

    method: str
    models: tuple[str, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    parameters: Mapping[str, PerModel]
    base: tuple[str, str] | None


def make_recipe_plan(recipe: Recipe) -> tuple[MergePlan, Inputs]:
    """Check the merge of a recipe; return its plan and the models with their weights, as `merge` takes them.

    Raises one `CheckpointError` that lists every problem.
    """
    paths = _paths(recipe)
    parts = _parts(recipe)
    problems = [problem for i, part in enumerate(parts) for problem in _base_problems(recipe, part, i)]
    _refuse(problems)
    plain = _plain(recipe, parts[0], paths) if recipe.models else None
    if plain is not None:
        return plain
    code = parse_code(recipe.output_dtype) if recipe.output_dtype else None
    places: dict[str, Place] = {}

    def stacked(readers: Sequence[ModelReader]) -> tuple[dict[str, TensorSpec], list[str]]:
        by_name = dict(zip(paths, readers, strict=True))
        found, specs, differences = stacked_specs(recipe, by_name, code)
        places.update(found)
        return specs, _tower_problems(paths, by_name) or differences or _config_problems(recipe, paths)

    models = checked_models(
        list(paths.values()),
        code,
        [],
        stacked=stacked if recipe.slices else None,
        allow=recipe.btm_scale.allow,
        choice=_vocabulary(recipe, paths),
    )
    places = places or full_places(list(models.specs), len(parts[0].models))
    merged = {name: _merged(recipe, parts[place.part], name, place) for name, place in places.items()}
    _refuse(_method_problems(merged, paths))
    inputs = tuple((path, 1.0) for path in paths.values())
    return _plan(recipe, models, inputs, merged, paths), inputs


def local_models(names: Sequence[str | Path]) -> dict[str, Path]:
    """Return the directory of each model. Raises one `CheckpointError` for all that cannot be located."""
    paths: dict[str, Path] = {}
    problems = []
    for name in names:
        try:
            paths[str(name)] = local_model(name if isinstance(name, Path) else Path(name))
        except CheckpointError as error:
            problems.append(str(error))
    _refuse(problems)
    return paths


def _paths(recipe: Recipe) -> dict[str, Path]:
    """Return the directory of each model of a recipe, with the base that completes adapters.

    The `base_model` completes those whose own base is not here.
    """
    paths, given = local_models(recipe.model_names), recipe.btm_scale.adapter_base
    base = given or recipe.base_model
    if base is None:
        return paths
    origin = local_models([base])[base]
    return {
        name: with_base(path, origin) if path != origin and (given or lacks_base(path)) else path
        for name, path in paths.items()
    }


def _vocabulary(recipe: Recipe, paths: Mapping[str, Path]) -> Vocabulary | None:
    """Return the vocabulary that a recipe asks for, or None."""
    source, base = recipe.vocabulary, paths[recipe.base_model] if recipe.base_model else None
    if source is None:
        return None
    where = source if source in ("union", "base") else local_models([source])[source]
    return Vocabulary(where, recipe.btm_scale.new_rows, base)


def _tower_problems(paths: Mapping[str, Path], models: Mapping[str, ModelReader]) -> list[str]:
    """Return a problem for each model with layers outside the language model."""
    return [
        f"{name} has a vision or audio tower, and slices are of a language model's layers. Merge it with `models`."
        for name, path in paths.items()
        if other_towers(path, models[name].names)
    ]


def _config_problems(recipe: Recipe, paths: Mapping[str, Path]) -> list[str]:
    """Return a problem for each setting of a layer that the config.json of the output cannot have."""
    configs = {path: described_config(path) for path in paths.values()}
    layers = [(configs[path], number) for path, number in origin_of_layers(recipe, paths)]
    first = next((config for config in configs.values() if config), {})
    return stacked_config(first, layers)[1]


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise CheckpointError(f"Cannot merge these models. Nothing was written:\n{listing}")


def _parts(recipe: Recipe) -> list[_Part]:
    """Return the slices; full models are one, to which a base that is not listed is added as mergekit does."""
    if recipe.slices is None:
        given = {one.model: one.parameters for one in recipe.models or ()}
        if recipe.base_model is not None:
            given.setdefault(recipe.base_model, {})
        settings = tuple((own, recipe.parameters) for own in given.values())
        return [_Part(tuple(given), settings, (recipe.parameters,), recipe.base_model)]
    return [
        _Part(
            tuple(source.model for source in one.sources),
            tuple((source.parameters, one.parameters, recipe.parameters) for source in one.sources),
            (one.parameters, recipe.parameters),
            one.base_model or recipe.base_model,
        )
        for one in recipe.slices
    ]


def _base_problems(recipe: Recipe, part: _Part, index: int) -> list[str]:
    where = "models" if recipe.models else f"slices.{index}.sources"
    by_t = recipe.merge_method == SLERP and interpolation(part.shared, "", 0.0) is not None
    if recipe.method.base == "input" and not by_t:
        return []
    if part.base is None and (recipe.method.base == "needed" or by_t):
        return [
            f"base_model is missing. '{recipe.merge_method}' needs it: the model where `t` is 0, or differences start."
        ]
    if part.base is not None and part.base not in part.models:
        return [f"{where} lacks the base model {part.base}. Add it to the sources, or give another base_model."]
    if by_t and len(part.models) != 2:
        return [f"{where} has {len(part.models)} models. '{SLERP}' merges 2, of which one is the base_model."]
    return []


def _merged(recipe: Recipe, part: _Part, tensor: str, place: Place) -> _Merged:
    method = recipe.method
    names = dict(zip(part.models, place.names, strict=True))
    by_model = dict(zip(part.models, part.settings, strict=True))
    t = interpolation(part.shared, tensor, place.t) if method.name == SLERP else None
    if t is not None:
        weights = tuple(1 - t if model == part.base else t for model in part.models)
        return _Merged(method.function, part.models, place.names, weights, {}, None)
    if method.name == SLERP and not any(WEIGHT in settings for own in part.settings for settings in own):
        raise CheckpointError("The parameter t is missing. Give the fraction of the way from base_model to the other.")
    base = part.base if method.base != "input" else None
    used = tuple(model for model in part.models if model != base)
    if not used and base is not None:
        return _Merged("passthrough", (base,), (names[base],), (1.0,), {"scale": 1.0}, None)
    weights, parameters = parameters_of(
        method,
        tensor=tensor,
        t=place.t,
        shared=part.shared,
        models=[(names[model], by_model[model]) for model in used],
    )
    origin = (base, names[base]) if base is not None else None
    return _Merged(method.function, used, tuple(names[model] for model in used), weights, parameters, origin)


def _plain(recipe: Recipe, part: _Part, paths: Mapping[str, Path]) -> tuple[MergePlan, Inputs] | None:
    """Return the plan of a recipe that the arguments of `merge` can express, which is the same as theirs, else None."""
    scopes = [settings for one in part.settings for settings in one]
    if not all(is_constant(setting) for settings in scopes for setting in settings.values()):
        return None
    merged = _merged(recipe, part, "the models", Place(0, 0.0, ("the models",) * len(part.models)))
    parameters = {name: value for name, value in merged.parameters.items() if not isinstance(value, tuple)}
    if len(parameters) < len(merged.parameters):
        return None
    inputs = tuple((paths[model], weight) for model, weight in zip(merged.models, merged.weights, strict=True))
    choice = _vocabulary(recipe, paths)
    tokenizer = choice.tokenizer if choice else None
    if choice and tokenizer == "base" and merged.base is None:
        tokenizer = choice.base  # which is merged like the others
    plan = make_plan(
        inputs,
        method=merged.method,
        parameters=parameters,
        base=paths[merged.base[0]] if merged.base else None,
        dtype=recipe.output_dtype,
        max_shard_bytes=recipe.btm_scale.max_shard_bytes,
        seed=recipe.btm_scale.random_seed,
        tokenizer=tokenizer,
        new_rows=recipe.btm_scale.new_rows,
        allow=recipe.btm_scale.allow,
    )
    return plan, inputs


def _method_problems(merged: Mapping[str, _Merged], paths: Mapping[str, Path]) -> list[str]:
    """Return the problems of weights and parameters, each with the first tensor that has it."""
    problems: dict[str, str] = {}
    for name, one in merged.items():
        method = TensorMerge(one.method, {}, (), (), (), None).method
        inputs = [(paths[model], weight) for model, weight in zip(one.models, one.weights, strict=True)]
        for problem in weight_problems(method, inputs) + parameter_problems(method, one.parameters):
            problems.setdefault(problem, name)
    return [f"{name}: {problem}" for problem, name in problems.items()]


def _plan(
    recipe: Recipe, models: Models, inputs: Inputs, merged: Mapping[str, _Merged], paths: Mapping[str, Path]
) -> MergePlan:
    extras = recipe.btm_scale
    plan = models.plan(inputs, None, recipe.method.function, {}, extras.max_shard_bytes, extras.random_seed)
    index = {source.path: i for i, source in enumerate(plan.sources)}
    places = {name: index[path] for name, path in paths.items()}
    origins = ((index[path], layer) for path, layer in origin_of_layers(recipe, paths))
    return replace(
        plan, tensors={name: _tensor_merge(one, places) for name, one in merged.items()}, layers=tuple(origins)
    )


def _tensor_merge(one: _Merged, places: Mapping[str, int]) -> TensorMerge:
    """Return the same with the models in the order of the plan's sources, which depends on their content only."""
    order = sorted(range(len(one.models)), key=lambda i: places[one.models[i]])

    def ordered(value: PerModel) -> PerModel:
        return tuple(value[i] for i in order) if isinstance(value, tuple) else value

    return TensorMerge(
        method_name=one.method,
        parameters={name: ordered(value) for name, value in one.parameters.items()},
        models=tuple(places[one.models[i]] for i in order),
        names=tuple(one.names[i] for i in order),
        weights=tuple(one.weights[i] for i in order),
        base=(places[one.base[0]], one.base[1]) if one.base else None,
    )
