"""Recipes: mergekit's YAML, read strictly, and the recipe of a merge, from which it can be repeated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len
from pydantic import BaseModel, ValidationError

from btm_scale.checkpoint.merge.recipe_methods import RecipeMethod, recipe_method
from btm_scale.checkpoint.merge.recipe_parameters import Settings, setting_problems
from btm_scale.checkpoint.merge.registry import PerModel
from btm_scale.errors import CheckpointError, ConfigError, near_match
from btm_scale.util.bounded_json import read_bounded, shown
from btm_scale.util.records import Part
from btm_scale.util.yaml_text import dump_text, parse_yaml

NAME = "merge_recipe.yaml"  # in the output of a merge
_MAX_BYTES = 8_000_000
# Keys of mergekit's YAML that are not read, each with the remedy.
_UNSUPPORTED = {
    "modules": "Merge the language model alone, with `models` or `slices` at the top.",
    "chat_template": "Give `base` or the path of a template as `chat_template` of the key `btm_scale`.",
    "residual_weight": "Leave it out: mergekit does not use it either.",
    "override_architecture": "Leave it out: tensors are matched by name for every architecture.",
    "lora": "Merge the adapter into its base first, and give the merged model.",
}


class RecipeModel(Part):
    """A model of a merge: a directory, or the name of a model in the Hugging Face cache."""

    model: str
    parameters: Settings = {}


class RecipeSource(RecipeModel):
    """Some layers of a model: from the first number up to, not including, the second."""

    layer_range: Annotated[list[int], Len(2, 2)]


class RecipeSlice(Part):
    """Consecutive layers of the output, merged from the same number of layers of each source."""

    sources: Annotated[list[RecipeSource], Len(1)]
    base_model: str | None = None
    parameters: Settings = {}


class RecipeTokenizer(Part):
    """The vocabulary of the output: `union`, `base`, or a model or tokenizer."""

    source: str


class Extras(Part):
    """What mergekit has as options of its command line, and the arguments of `merge` that it lacks.

    `adapter_base` is the model that completes adapters and checkpoints without their frozen weights.
    """

    random_seed: int = 0
    max_shard_bytes: Annotated[float, Ge(1)] = 5e9
    adapter_base: str | None = None
    chat_template: str | None = None
    new_rows: Literal["mean", "zero"] = "mean"
    allow: list[str] = []


class Recipe(Part):
    """A merge in mergekit's YAML. mergekit ignores the key `btm_scale`."""

    merge_method: str
    models: Annotated[list[RecipeModel], Len(1)] | None = None
    slices: Annotated[list[RecipeSlice], Len(1)] | None = None
    base_model: str | None = None
    parameters: Settings = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: RecipeTokenizer | None = None
    btm_scale: Extras = Extras()

    @property
    def method(self) -> RecipeMethod:
        """The merge method, by its name in recipes."""
        return recipe_method(self.merge_method)

    @property
    def output_dtype(self) -> str | None:
        """The name of the output's dtype, or None for the models' own."""
        return self.out_dtype or self.dtype

    @property
    def vocabulary(self) -> str | None:
        """The source of the output's tokenizer, or None if all models must have the same one."""
        return self.tokenizer.source if self.tokenizer else self.tokenizer_source

    @property
    def model_names(self) -> list[str]:
        """All models, as they are given, each once."""
        sources = [source for one in self.slices or () for source in one.sources]
        bases = [self.base_model, *(one.base_model for one in self.slices or ())]
        return list(dict.fromkeys([*(one.model for one in [*(self.models or ()), *sources]), *filter(None, bases)]))

    def text(self) -> str:
        """Return the recipe as YAML."""
        values = self.model_dump(exclude_defaults=True)
        extras = self.btm_scale.model_dump(exclude_defaults=True)
        values["btm_scale"] = self.btm_scale.model_dump(include={"random_seed", "max_shard_bytes"}) | extras
        return dump_text(values)


def recipe_values(file: Path) -> dict[str, Any]:
    """Return the mapping in a recipe's YAML file. Raises `CheckpointError` for a file that has none."""
    try:
        values = parse_yaml(read_bounded(file, _MAX_BYTES).decode("utf-8"), str(file))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except FileNotFoundError:
        raise CheckpointError(f"No recipe at {file}. Give the path of a YAML file.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Give the path of a YAML file.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is not a mapping of keys to values. A recipe needs at least `merge_method`.")
    return values


def load_recipe(file: Path) -> Recipe:
    """Return the recipe in a YAML file. Raises `CheckpointError` with every key that is invalid or not supported."""
    values = recipe_values(file)
    problems = list(_unsupported(values))
    if not problems:
        try:
            # Strict, so that a number in quotes is not taken for a number.
            recipe = Recipe.model_validate(values, strict=True)
            problems = list(_contradictions(recipe)) or setting_problems(recipe.method, _scopes(recipe))
        except ValidationError as error:
            problems = [sentence(problem, _KEYS) for problem in error.errors(include_url=False)]
    refuse_recipe(file, problems)
    return recipe


def refuse_recipe(file: Path, problems: Sequence[str]) -> None:
    """Raise `CheckpointError` that lists the problems of a recipe, if there are any."""
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise CheckpointError(f"Cannot merge by {file}. Nothing was written:\n{listing}")


def recipe_of(
    inputs: list[tuple[str, float]],
    *,
    method: str,
    parameters: Mapping[str, PerModel],
    base: str | None,
    dtype: str | None,
    tokenizer: str | None,
    extras: Extras,
) -> Recipe:
    """Return the recipe of a merge that was given by its arguments."""
    named = recipe_method(method, ours=True)
    own = {"weight": True} if named.weighted else {}
    names: list[str] = []
    for name, _ in inputs:
        while name in names:  # a recipe lists a name once, and this is another one for the same folder
            name += "/."
        names.append(name)
    return Recipe(
        merge_method=named.name,
        models=[
            RecipeModel(model=name, parameters=dict.fromkeys(own, weight))
            for name, (_, weight) in zip(names, inputs, strict=True)
        ],
        base_model=base,
        parameters=named.written(parameters),
        dtype=dtype,
        tokenizer_source=tokenizer,
        btm_scale=extras,
    )


def _unsupported(values: Any, path: str = "") -> Iterator[str]:
    """Yield a problem for every key that mergekit knows and this version does not."""
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(values, dict):
        items = iter(values.items())
    elif isinstance(values, list):
        items = enumerate(values)
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        if here == "btm_scale":
            continue
        if key in _UNSUPPORTED and value is not None:
            yield f"{here} is {shown(value)}, and is not supported. {_UNSUPPORTED[key]}"
        elif key in ("model", "base_model") and isinstance(value, str) and "+" in value and not _is_path(value):
            yield f"{here} is {shown(value)}, a model with an adapter, and is not supported. {_UNSUPPORTED['lora']}"
        elif key != "parameters":
            yield from _unsupported(value, here)


def _is_path(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # a name that is too long
        return False


def _contradictions(recipe: Recipe) -> Iterator[str]:
    if (recipe.models is None) == (recipe.slices is None):
        both = "both" if recipe.models else "neither"
        yield f"The recipe has {both} of `models` and `slices`. Give one of them."
    if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
        yield "The recipe has both `tokenizer` and `tokenizer_source`. Give one of them."
    try:
        method = recipe.method
    except CheckpointError as error:
        yield f"merge_method: {error}"
        return
    if method.base == "needed" and recipe.base_model is None and not _every_slice_has_a_base(recipe):
        yield f"base_model is missing. '{recipe.merge_method}' needs the model that all others were trained from."
    for i, one in enumerate(recipe.slices or ()):
        lengths = {source.layer_range[1] - source.layer_range[0] for source in one.sources}
        ranges = ", ".join(str(source.layer_range) for source in one.sources)
        if len(lengths) > 1:
            yield f"slices.{i} has the layer ranges {ranges}. Those of one slice must have the same length."
        elif min(lengths) < 1 or min(source.layer_range[0] for source in one.sources) < 0:
            yield f"slices.{i} has the layer ranges {ranges}. A range is [first, end] with 0 <= first < end."
    for path, models in _model_lists(recipe):
        twice = [name for name in models if models.count(name) > 1]
        if twice:
            yield f"{path} lists {twice[0]} twice. Give each model once, and change its weight."


def _every_slice_has_a_base(recipe: Recipe) -> bool:
    return recipe.slices is not None and all(one.base_model for one in recipe.slices)


def _model_lists(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    if recipe.models:
        yield "models", [one.model for one in recipe.models]
    for i, one in enumerate(recipe.slices or ()):
        yield f"slices.{i}.sources", [source.model for source in one.sources]


def _scopes(recipe: Recipe) -> Iterator[tuple[str, Settings, bool]]:
    """Yield the path of every `parameters`, its settings, and whether they are of one model."""
    yield "parameters", recipe.parameters, False
    for i, model in enumerate(recipe.models or ()):
        yield f"models.{i}.parameters", model.parameters, True
    for i, one in enumerate(recipe.slices or ()):
        yield f"slices.{i}.parameters", one.parameters, False
        for j, source in enumerate(one.sources):
            yield f"slices.{i}.sources.{j}.parameters", source.parameters, True


_KEYS: Mapping[str, type[BaseModel]] = {
    "": Recipe,
    "models": RecipeModel,
    "slices": RecipeSlice,
    "sources": RecipeSource,
    "tokenizer": RecipeTokenizer,
    "btm_scale": Extras,
}


def sentence(problem: Any, sections: Mapping[str, type[BaseModel]]) -> str:
    """Return a validation error as a message; `sections` are the models of a recipe's keys, its own under ''."""
    *parents, key = problem["loc"]
    path = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        section = next((part for part in reversed(parents) if isinstance(part, str)), "")
        known = sorted(sections.get(section, sections[""]).model_fields)
        return f"{path} is unknown.{near_match(str(key), known)} The keys here are {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{path} is missing. A recipe needs this key."
    rule = re.sub("^Input should be ", "must be ", problem["msg"])
    return f"{path} {rule[0].lower()}{rule[1:]}, and is {shown(problem['input'])}."
