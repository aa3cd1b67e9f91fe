"""Merge methods: their inputs, their declarations and their registry."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from btm_scale.checkpoint.merge.arrays import copied
from btm_scale.errors import CheckpointError, unknown_name

if TYPE_CHECKING:  # `merge --help` reads the methods' signatures without it
    import torch

# What a parameter of this name may be, in any method that has it; others may be any finite number. plan.py checks it.
RANGES = {
    "density": "above 0, at most 1",
    "window": "0 or more, with density - window/2 above 0 and density + window/2 at most 1",
    "gamma": "0 or more, below 1",
    "max_iter": "0 to 1,000",
    "normalize": "0 or 1",
    "rescale": "0 or 1",
    "flatten": "0 or 1",
    "row_wise": "0 or 1",
    "filter_wise": "0 or 1",
    "top_k": "1 to the number of models",
}

PerModel = float | tuple[float, ...]
"""A parameter that a recipe may set for each model: one value for all, or one per model in the order of the weights."""


def for_each(value: PerModel, models: int) -> tuple[float, ...]:
    """Return the value of a parameter for each of the models."""
    return value if isinstance(value, tuple) else (value,) * models


@dataclass(frozen=True)
class Piece:
    """The same part of one tensor from every model, in float64.

    The tensors are torch's; elementwise methods also get NumPy arrays. They use only operators and functions of both
    libraries, and those of `arrays`.
    `tensors` can be iterated once, and each tensor is valid until the next is taken, so that streaming methods hold
    one at a time. `zeros` is an array of the part's shape for the result. An elementwise method gets flat ranges of
    any length; other methods get complete rows in their shape, or a complete vector. `noise(i)` is uniform in [0, 1)
    and depends only on the model's content, the tensor's name, the seed and the element's position.
    """

    tensors: Iterable[torch.Tensor]
    weights: Sequence[float]
    zeros: torch.Tensor
    base: torch.Tensor | None = None
    noise: Callable[[int], torch.Tensor] | None = None

    @property
    def origin(self) -> torch.Tensor:
        """The base, for a method that declares `needs_base`."""
        assert self.base is not None
        return self.base

    def random(self, i: int) -> torch.Tensor:
        """Return the noise of model i, for a method that draws at random."""
        assert self.noise is not None
        return self.noise(i)

    def copies(self) -> list[torch.Tensor]:
        """Return copies of every model's part, valid after the iteration."""
        return [copied(tensor) for tensor in self.tensors]

    def deltas(self) -> list[torch.Tensor]:
        """Return every model's difference from the base."""
        return [tensor - self.origin for tensor in self.tensors]

    def vectors(self) -> list[torch.Tensor]:
        """Return every model's difference from the base, or a copy of the model's part if there is no base."""
        return self.copies() if self.base is None else self.deltas()


@dataclass(frozen=True)
class TensorPieces:
    """One tensor of every model as an iterable of pieces; every iteration gives the same pieces."""

    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Piece]]

    def __iter__(self) -> Iterator[Piece]:
        return self.pieces()

    @property
    def elements(self) -> int:
        """Number of elements of the tensor."""
        return math.prod(self.shape)


Merge = Callable[[Piece], "torch.Tensor"]


@dataclass(frozen=True)
class Method:
    """A registered merge method and its requirements.

    An elementwise method is a function of a piece. Any other is a function of `TensorPieces`: it computes statistics in
    passes over the pieces and returns a function that merges one piece. So no method holds a full tensor.
    """

    name: str
    function: Callable[..., Any]
    elementwise: bool
    needs_base: bool
    weighted: bool
    exactly: int | None
    may_have_base: bool = False

    @property
    def takes_base(self) -> bool:
        """Whether a base may be given."""
        return self.needs_base or self.may_have_base

    @property
    def per_model(self) -> frozenset[str]:
        """Names of the parameters that may have one value per model."""
        signature = inspect.signature(self.function).parameters.values()
        return frozenset(one.name for one in signature if one.annotation == "PerModel")

    @property
    def meaning(self) -> str:
        """What it does: the first paragraph of the function's docstring, on one line."""
        return " ".join(inspect.cleandoc(self.function.__doc__ or "").partition("\n\n")[0].split())

    @functools.cached_property
    def parameters(self) -> Mapping[str, float]:
        """Parameters and their defaults, from the function's signature."""
        signature = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in signature if one.kind is one.KEYWORD_ONLY}

    def prepare(self, pieces: TensorPieces, parameters: Mapping[str, PerModel]) -> Merge:
        """Return the function that merges one piece of a tensor."""
        if self.elementwise:
            return functools.partial(self.function, **parameters)
        merge: Merge = self.function(pieces, **parameters)
        return merge


METHODS: dict[str, Method] = {}


def method(
    *,
    elementwise: bool,
    needs_base: bool = False,
    weighted: bool = True,
    exactly: int | None = None,
    may_have_base: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a merge method under its own name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        METHODS[name] = Method(name, function, elementwise, needs_base, weighted, exactly, may_have_base)
        return function

    return register


def find_method(name: str) -> Method:
    """Return the method called `name`. Raises `CheckpointError`, suggesting the nearest name, for an unknown one."""
    if name not in METHODS:
        raise CheckpointError(unknown_name("merge method", name, sorted(METHODS)))
    return METHODS[name]
