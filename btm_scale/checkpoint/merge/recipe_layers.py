"""The layers of an output that a recipe stacks from slices of models: which tensor is read from where."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec
from btm_scale.checkpoint.merge.compatibility import is_derived
from btm_scale.checkpoint.merge.recipe import Recipe
from btm_scale.errors import few_names, first_few

# Weights before the first layer: they are merged as the first slice is, the others outside of layers as the last.
_BEFORE = re.compile(r"(?:.*\.)?(?:wte|wpe|project_in|(?!embed_out)\w*embed\w*)\.[^.]+")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the output is read from.

    `part` is the index of the recipe's slice, 0 for a recipe of full models. `names` are the tensors of the part's
    models, and `t` is the fraction of the slice's layers that precede this one.
    """

    part: int
    t: float
    names: tuple[str, ...]


def layer_of(name: str) -> int | None:
    """Return the number of the layer to which a tensor belongs: the first number among the parts of its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def in_layer(name: str, layer: int) -> str:
    """Return the name of the same tensor in another layer."""
    parts = name.split(".")
    place = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join([*parts[:place], str(layer), *parts[place + 1 :]])


def fraction_of(layer: int, layers: int) -> float:
    """Return the position of a layer in a gradient: from 0 for the first to 1 for the last, 1 for a single one."""
    return layer / (layers - 1) if layers > 1 else 1.0


def full_places(names: Sequence[str], models: int) -> dict[str, Place]:
    """Return the places of a recipe that merges full models: each tensor is read from that of the same name."""
    layers = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=0)
    return {
        name: Place(0, 0.0 if (layer := layer_of(name)) is None else fraction_of(layer, layers), (name,) * models)
        for name in names
    }


def stacked_places(recipe: Recipe, models: Mapping[str, ModelReader]) -> tuple[dict[str, Place], list[str]]:
    """Return the places of a recipe of slices, and a problem for each layer or tensor that a model lacks."""
    slices = recipe.slices or []
    problems = list(_range_problems(recipe, models))
    if problems:
        return {}, problems
    places: dict[str, Place] = {}
    layer = 0
    for i, one in enumerate(slices):
        readers = [models[source.model] for source in one.sources]
        firsts = [source.layer_range[0] for source in one.sources]
        length = one.sources[0].layer_range[1] - firsts[0]
        by_layer: dict[int, list[str]] = {}
        for name in _own_names(readers[0]):
            number = layer_of(name)
            if number is None:
                if i == (0 if _BEFORE.fullmatch(name) else len(slices) - 1):
                    places[name] = Place(i, 0.0, (name,) * len(readers))
            else:
                by_layer.setdefault(number, []).append(name)
        for step in range(length):
            for name in by_layer[firsts[0] + step]:
                names = tuple(in_layer(name, first + step) for first in firsts)
                places[in_layer(name, layer)] = Place(i, fraction_of(step, length), names)
            layer += 1
    for i, one in enumerate(slices):
        for j, source in enumerate(one.sources):
            have = set(models[source.model].names)
            lacking = [place.names[j] for place in places.values() if place.part == i and place.names[j] not in have]
            if lacking:
                problems.append(
                    f"{source.model} has no tensor {few_names(lacking, 'tensors')}, which slices.{i} needs."
                )
    return dict(sorted(places.items())), problems


def stacked_specs(
    recipe: Recipe, models: Mapping[str, ModelReader], code: str | None
) -> tuple[dict[str, Place], dict[str, TensorSpec], list[str]]:
    """Return the places and specs of a recipe of slices, and every kind of difference between tensors of one place."""
    places, problems = stacked_places(recipe, models)
    specs: dict[str, TensorSpec] = {}
    firsts: dict[str, TensorSpec] = {}  # of each tensor of a layer, in the first layer that has it
    shapes, dtypes, values = [], [], []
    for name, place in () if problems else places.items():
        readers = [models[source.model] for source in (recipe.slices or [])[place.part].sources]
        first, *others = (reader.spec(own) for reader, own in zip(readers, place.names, strict=True))
        is_float = first.is_floating_point
        specs[name] = TensorSpec(code, first.shape) if code is not None and is_float else first
        kind = in_layer(name, 0) if layer_of(name) is not None else name
        if (seen := firsts.setdefault(kind, first)).code != first.code and code is None:
            dtypes.append(f"'{name}' {first} and {seen} in a layer before")
        for other in others:
            if other.shape != first.shape:
                shapes.append(f"'{name}' {list(first.shape)} and {list(other.shape)}")
            elif other.code != first.code and (code is None or not (is_float and other.is_floating_point)):
                dtypes.append(f"'{name}' {first} and {other}")
        same = zip(readers, place.names, strict=True) if not is_float else ()
        if len({bytes(reader.read_bytes(own, 0, first.elements)) for reader, own in same}) > 1:
            values.append(f"'{name}' {first}")
    kinds = (
        ("shapes", shapes, "Merge layers of one shape."),
        ("dtypes", dtypes, "Give the output's dtype: `dtype` in the recipe, or --dtype."),
        ("values of integers", values, "They are copied, not averaged. Merge models in which they are equal."),
    )
    problems += [
        f"The models of slices have different {what}: {first_few(examples, 'tensors')}. {remedy}"
        for what, examples, remedy in kinds
        if examples
    ]
    return places, specs, problems


def origin_of_layers(recipe: Recipe, paths: Mapping[str, Path]) -> tuple[tuple[Path, int], ...]:
    """Return, for each layer of the output, the first model that it is merged from and its number there."""
    return tuple(
        (paths[one.sources[0].model], number)
        for one in recipe.slices or ()
        for number in range(*one.sources[0].layer_range)
    )


def _own_names(reader: ModelReader) -> list[str]:
    return [name for name in reader.names if not is_derived(name, reader)]


def _range_problems(recipe: Recipe, models: Mapping[str, ModelReader]) -> Iterator[str]:
    for i, one in enumerate(recipe.slices or ()):
        for j, source in enumerate(one.sources):
            numbers = {layer for name in models[source.model].names if (layer := layer_of(name)) is not None}
            lacking = next((number for number in range(*source.layer_range) if number not in numbers), None)
            if lacking is not None:
                count = max(numbers, default=-1) + 1
                yield (
                    f"slices.{i}.sources.{j}.layer_range is {source.layer_range}, but {source.model} has {count} "
                    f"layers and none with the number {lacking}. Give a range within [0, {count}]."
                )
