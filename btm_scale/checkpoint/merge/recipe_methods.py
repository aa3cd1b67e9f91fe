"""The merge methods by their names in mergekit, with mergekit's names and defaults of their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from btm_scale.checkpoint.merge.registry import RANGES, Method, PerModel, find_method
from btm_scale.errors import CheckpointError, unknown_name

_FACTORS = {"window": 2.0}  # ours divided by the recipe's: a window is twice mergekit's epsilon


@dataclass(frozen=True)
class RecipeMethod:
    """A merge method in a recipe.

    `names` maps our parameters to the recipe's where they differ, `defaults` has the recipe's defaults by our names
    where they differ, None for a parameter that must be given. With base `input` the base is merged like the others.
    """

    name: str
    function: str
    base: Literal["needed", "optional", "input"]
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def registered(self) -> Method:
        """The registered method."""
        return find_method(self.function)

    @property
    def weighted(self) -> bool:
        """Whether models have a parameter `weight`."""
        return self.registered.weighted

    def recipe_name(self, parameter: str) -> str:
        """Return the recipe's name of one of our parameters."""
        return self.names.get(parameter, parameter)

    def factor(self, parameter: str) -> float:
        """Return the number by which a value in the recipe is multiplied."""
        return _FACTORS.get(parameter, 1.0) if parameter in self.names else 1.0

    def default(self, parameter: str) -> float | None:
        """Return the recipe's default of one of our parameters, or None if it must be given."""
        return self.defaults.get(parameter, self.registered.parameters[parameter])

    def written(self, parameters: Mapping[str, PerModel]) -> dict[str, float]:
        """Return our parameters, one number each, as a recipe has them."""
        return {
            self.recipe_name(name): bool(value) if RANGES.get(name) == "0 or 1" else value / self.factor(name)
            for name, value in parameters.items()
            if isinstance(value, (int, float))
        }


_TASK = {"scale": "lambda"}
_KEPT = {"density": 1.0}

# Where `t` is given, slerp's weights are 1 - t of the base and t of the other model.
SLERP = "slerp"
_TABLE = (
    RecipeMethod("linear", "linear", "input"),
    RecipeMethod(SLERP, "slerp", "input"),
    RecipeMethod("nuslerp", "nuslerp", "optional", {"flatten": "nuslerp_flatten", "row_wise": "nuslerp_row_wise"}),
    RecipeMethod("multislerp", "multislerp", "optional", {"normalize": "normalize_weights"}),
    RecipeMethod("karcher", "karcher", "input"),
    RecipeMethod("task_arithmetic", "task_arithmetic", "needed", _TASK),
    RecipeMethod("ties", "ties", "needed", _TASK, _KEPT),
    RecipeMethod("dare_ties", "dare_ties", "needed", _TASK, _KEPT),
    RecipeMethod("dare_linear", "dare", "needed", _TASK, _KEPT),
    RecipeMethod("breadcrumbs", "breadcrumbs", "needed", _TASK, _KEPT),
    RecipeMethod("breadcrumbs_ties", "breadcrumbs_ties", "needed", _TASK, _KEPT),
    RecipeMethod("della", "della", "needed", {**_TASK, "window": "epsilon"}, {**_KEPT, "window": 0.3}),
    RecipeMethod("della_linear", "della_linear", "needed", {**_TASK, "window": "epsilon"}, {**_KEPT, "window": 0.3}),
    RecipeMethod("model_stock", "model_stock", "needed"),
    RecipeMethod("arcee_fusion", "arcee_fusion", "needed"),
    RecipeMethod("sce", "sce", "needed", {"density": "select_topk"}),
    RecipeMethod("nearswap", "nearswap", "needed", {}, {"t": None}),
    RecipeMethod("ram", "ram", "needed"),
    RecipeMethod("ramplus_tl", "ramplus_tl", "needed"),
    RecipeMethod("passthrough", "passthrough", "input"),
    RecipeMethod("widen", "widen", "needed"),
)
RECIPE_METHODS: Mapping[str, RecipeMethod] = {method.name: method for method in _TABLE}


def recipe_method(name: str, *, ours: bool = False) -> RecipeMethod:
    """Return a method by its name in recipes, or, with `ours`, by its name in the registry.

    Raises `CheckpointError` with the closest name for an unknown one.
    """
    if ours:
        return next(method for method in _TABLE if method.function == find_method(name).name)
    if name not in RECIPE_METHODS:
        raise CheckpointError(unknown_name("merge method", name, sorted(RECIPE_METHODS)))
    return RECIPE_METHODS[name]
