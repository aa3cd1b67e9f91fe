"""What a merge method is given, what it declares, and where it is registered."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from btm_scale.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """The same part of one tensor from every model.

    `tensors` are as stored, can be walked once, and each is valid until the next is taken: then streaming
    methods hold one at a time. `zeros` is an array of the part's shape in the dtype of the arithmetic, for
    the result. A method that is not elementwise gets whole tensors in their shape, an elementwise one flat
    ranges of any length. `noise(i)` is uniform in [0, 1), one float64 per element, and depends on the model's
    content, the tensor's name, the seed and the element's position only.
    """

    tensors: Iterable[torch.Tensor]
    weights: Sequence[float]
    zeros: torch.Tensor
    base: torch.Tensor | None = None
    noise: Callable[[int], torch.Tensor] | None = None

    @property
    def origin(self) -> torch.Tensor:
        """The base, for a method that declared that it needs one."""
        assert self.base is not None
        return self.base

    def deltas(self) -> list[torch.Tensor]:
        """Every model's difference from the base, in the dtype of the arithmetic."""
        return [tensor - self.origin for tensor in self.tensors]


@dataclass(frozen=True)
class Method:
    """A registered method: what it needs, and the function."""

    name: str
    function: Callable[..., torch.Tensor]
    elementwise: bool
    needs_base: bool
    weighted: bool
    exactly: int | None

    @property
    def parameters(self) -> dict[str, float]:
        """Its parameters and their defaults, read from the signature."""
        signature = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in signature if one.kind is one.KEYWORD_ONLY}

    def __call__(self, piece: Piece, **parameters: float) -> torch.Tensor:
        """Merge one piece."""
        return self.function(piece, **parameters)


METHODS: dict[str, Method] = {}


def method(
    *, elementwise: bool, needs_base: bool = False, weighted: bool = True, exactly: int | None = None
) -> Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]:
    """Register a function under its name."""

    def register(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        name = function.__name__
        METHODS[name] = Method(name, function, elementwise, needs_base, weighted, exactly)
        return function

    return register


def find_method(name: str) -> Method:
    """The method of that name; raises `CheckpointError` with the names there are."""
    if name not in METHODS:
        raise CheckpointError(f"merge method '{name}' is unknown. Use one of {', '.join(sorted(METHODS))}.")
    return METHODS[name]
