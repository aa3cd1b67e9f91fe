"""Parameters of a recipe: filters by tensor name, gradients over layers, and which of several settings applies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator

from btm_scale.checkpoint.merge.recipe_methods import SLERP, RecipeMethod
from btm_scale.checkpoint.merge.registry import RANGES, PerModel
from btm_scale.errors import CheckpointError, near_match
from btm_scale.util.bounded_json import shown

Settings = Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]
"""A `parameters` of a recipe: by name a number, a list of numbers (a gradient), or values with filters."""

WEIGHT = "weight"
_IGNORED = ("int8_mask",)  # saves memory in mergekit, and changes no result
_CONDITION = ("value", "filter")


def value_of(setting: Any, tensor: str, t: float) -> float | None:
    """Return the value of a setting for a tensor at the fraction `t` of the layers, or None if no filter applies.

    A gradient is interpolated linearly; one of booleans is not. The first matching filter applies.
    """
    if isinstance(setting, (bool, int, float)):
        return float(setting)
    conditions: list[Any] = [setting] if isinstance(setting, dict) else setting
    if not conditions:
        return None
    if not isinstance(conditions[0], dict):
        return _on_gradient(conditions, t)
    for condition in conditions:
        pattern = condition.get("filter")
        if pattern is None or pattern == "*" or pattern in tensor:
            return value_of(condition["value"], tensor, t)
    return None


def _on_gradient(values: Sequence[float], t: float) -> float:
    position = t * (len(values) - 1)
    first = int(position)
    if any(isinstance(value, bool) for value in values):
        return float(values[first])
    second, fraction = min(len(values) - 1, first + 1), position - first
    return (1 - fraction) * values[first] + fraction * values[second]


def parameters_of(
    method: RecipeMethod,
    *,
    tensor: str,
    t: float,
    shared: Sequence[Settings],
    models: Sequence[tuple[str, Sequence[Settings]]],
) -> tuple[tuple[float, ...], dict[str, PerModel]]:
    """Return the models' weights and the parameters of a tensor, under our names.

    `shared` and each model's settings are in the order of precedence, each model with the name of its tensor. Raises
    `CheckpointError` for a parameter that must be given and is not.
    """
    weights = (
        tuple(_first(WEIGHT, scopes, name, t, None) for name, scopes in models)
        if method.weighted
        else (1.0,) * len(models)
    )
    parameters: dict[str, PerModel] = {}
    for ours in method.registered.parameters:
        name, default, factor = method.recipe_name(ours), method.default(ours), method.factor(ours)
        if ours in method.registered.per_model:
            default = None if default is None else default / factor
            each = tuple(_first(name, scopes, own, t, default) * factor for own, scopes in models)
            parameters[ours] = each[0] if len(set(each)) == 1 else each
        else:
            parameters[ours] = _first(name, shared, tensor, t, default)
    if "window" in parameters:
        parameters["window"] = _without_window_where_all_is_kept(parameters, len(models))
    return weights, parameters


def _without_window_where_all_is_kept(parameters: Mapping[str, PerModel], models: int) -> PerModel:
    density, window = parameters["density"], parameters["window"]
    densities = density if isinstance(density, tuple) else (density,) * models
    windows = window if isinstance(window, tuple) else (window,) * models
    each = tuple(0.0 if kept == 1 else width for kept, width in zip(densities, windows, strict=True))
    return each[0] if len(set(each)) == 1 else each


def _first(name: str, scopes: Iterable[Settings], tensor: str, t: float, default: float | None) -> float:
    for settings in scopes:
        if name in settings and (value := value_of(settings[name], tensor, t)) is not None:
            return value
    if default is None:
        raise CheckpointError(f"The parameter {name} is missing for {tensor}. Give it for every model and tensor.")
    return default


def interpolation(shared: Sequence[Settings], tensor: str, t: float) -> float | None:
    """Return slerp's `t`, the fraction of the way from the base to the other model, or None if it is not given."""
    given = any("t" in settings for settings in shared)
    return _first("t", shared, tensor, t, None) if given else None


def is_constant(setting: Any) -> bool:
    """Whether a setting is one number for all tensors."""
    return isinstance(setting, (bool, int, float))


def setting_problems(method: RecipeMethod, scopes: Iterable[tuple[str, Settings, bool]]) -> list[str]:
    """Return every problem of a recipe's parameters, given the path of each section and whether it is a model's."""
    own = {method.recipe_name(name): name for name in method.registered.parameters}
    shared = [name for name, ours in own.items() if ours not in method.registered.per_model]
    each = [name for name in own if name not in shared] + ([WEIGHT] if method.weighted else [])
    if method.name == SLERP:
        shared.append("t")
    problems = []
    for path, settings, of_model in scopes:
        for name, setting in settings.items():
            here = f"{path}.{name}"
            if name in _IGNORED:
                continue
            if name not in shared and name not in each:
                known = sorted([*shared, *each])
                remedy = f"Its parameters are: {', '.join(known)}." if known else "It takes no parameters."
                problems.append(
                    f"{here} is not a parameter of '{method.name}'.{near_match(name, known)} {remedy} Leave it out."
                )
            elif of_model and name in shared:
                problems.append(f"{here} applies to all models. Move it to `parameters` of the recipe or the slice.")
            else:
                problems += _form_problems(here, setting, RANGES.get(own.get(name, ""), ""))
    return problems


def _form_problems(path: str, setting: Any, range_: str) -> Iterator[str]:
    if isinstance(setting, (bool, int, float)):
        if not math.isfinite(setting):
            yield f"{path} is {setting}. It must be finite."
        elif range_ == "0 or 1" and not isinstance(setting, bool) and setting not in (0, 1):
            yield f"{path} is {setting}. It must be true or false."
    elif isinstance(setting, dict):
        unknown = [key for key in setting if key not in _CONDITION]
        if unknown:
            near = near_match(str(unknown[0]), _CONDITION)
            yield f"{path}.{unknown[0]} is unknown.{near} The keys here are value and filter."
        elif "value" not in setting:
            yield f"{path}.value is missing. A filter needs a value."
        elif not isinstance(setting.get("filter"), (str, type(None))):
            yield f"{path}.filter is {shown(setting['filter'])}. It must be text, part of the name of a tensor."
        elif isinstance(setting["value"], dict) or any(isinstance(one, dict) for one in _items(setting["value"])):
            yield f"{path}.value has filters itself. It must be a number or a list of numbers."
        else:
            yield from _form_problems(f"{path}.value", setting["value"], range_)
    elif isinstance(setting, list) and setting:
        kinds = {isinstance(one, dict) for one in setting}
        if len(kinds) > 1:
            yield f"{path} has numbers and filters in one list. Give a gradient, or filters with values."
        for i, one in enumerate(setting):
            if isinstance(one, list):
                yield f"{path}.{i} is {shown(one)}. It must be a number."
            else:
                yield from _form_problems(f"{path}.{i}", one, range_)
    else:
        yield f"{path} is {shown(setting)}. It must be a number, a list of numbers, or values with filters."


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
