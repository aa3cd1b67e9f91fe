"""Check the number of models, the weights and the parameters of a merge method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from btm_scale.checkpoint.merge.registry import RANGES, Method, PerModel, for_each
from btm_scale.errors import near_match


def weight_problems(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[str]:
    """Return every problem of the models' number and weights."""
    weights = [weight for _, weight in inputs]
    problems = []
    if not inputs:
        problems.append("No input has a nonzero weight. Give at least one input a nonzero weight.")
    elif not math.isfinite(sum(map(abs, weights))):
        problems.append(f"The weights are {weights}. They and their sum must be finite.")
    elif method.name in ("linear", "slerp", "multislerp", "moe") and abs(sum(weights)) <= 1e-12 * sum(
        map(abs, weights)
    ):
        problems.append(f"The weights {weights} sum to 0. '{method.name}' divides by their sum: change a weight.")
    if method.exactly is not None and len(inputs) != method.exactly:
        besides = " besides the base" if method.needs_base else ""
        models = "1 model" if method.exactly == 1 else f"{method.exactly} models"
        problems.append(f"'{method.name}' merges exactly {models}{besides}, but {len(inputs)} were given.")
    if not method.weighted and len(set(weights)) > 1:
        problems.append(f"'{method.name}' computes its own weights. Leave out {weights}, or use another method.")
    return problems


def parameter_problems(method: Method, parameters: Mapping[str, PerModel]) -> list[str]:
    """Return every problem of a method's parameters."""
    defaults = method.parameters
    choices = ", ".join(f"{name} (default {value:g})" for name, value in defaults.items())
    remedy = f"Its parameters are: {choices}." if defaults else "It takes no parameters: leave it out."
    problems = [
        f"'{method.name}' has no parameter '{name}'.{near_match(name, list(defaults))} {remedy}"
        for name in parameters
        if name not in defaults
    ]
    settings = {**defaults, **parameters}
    for values in _one_per_model({name: settings[name] for name in defaults}):
        problems += _value_problems(method, values)
    return list(dict.fromkeys(problems))


def _one_per_model(settings: Mapping[str, PerModel]) -> list[dict[str, float]]:
    """Return the parameters of each model."""
    count = max((len(value) for value in settings.values() if isinstance(value, tuple)), default=1)
    every = {name: for_each(value, count) for name, value in settings.items()}
    return [{name: values[i] for name, values in every.items()} for i in range(count)]


def _value_problems(method: Method, settings: Mapping[str, float]) -> list[str]:
    problems = [
        f"'{name}' of '{method.name}' is {value}. It must be finite: leave it out for the default, "
        f"{method.parameters[name]}."
        for name, value in settings.items()
        if not math.isfinite(value)
    ]
    problems += [
        f"'{name}' of '{method.name}' is {value:g}. It must be {RANGES[name]}."
        for name, value in settings.items()
        if (RANGES.get(name) == "0 or 1" and value not in (0, 1))
        or (name == "gamma" and not 0 <= value < 1)
        or (name == "max_iter" and not 0 <= value <= 1000)
    ]
    density, half = settings.get("density", 1.0), settings.get("window", 0.0) / 2
    if not 0 < density - half <= density + half <= 1:
        windowed = "window" in settings
        kept = f"{density - half:g} to {density + half:g}" if windowed else f"{density:g}"
        problems.append(
            f"'{method.name}' would keep a fraction of {kept} of the elements. {'Both' if windowed else 'It'} must be "
            f"above 0 and at most 1: change {'density or window' if windowed else 'density'}."
        )
    return problems
