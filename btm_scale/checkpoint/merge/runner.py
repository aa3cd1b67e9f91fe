"""The arithmetic of a merge into one output, a unit at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import local

import torch

from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.hashing import BlockHashes
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.checkpoint.merge.plan import MergePlan, Unit
from btm_scale.checkpoint.merge.registry import Piece, Whole

_ROWS_ELEMENTS = 1 << 15  # in a piece of whole rows; torch sums so many in one order whatever the threads


@dataclass(frozen=True)
class Target:
    """One output: what it shall be, what it is made of, and where its bytes go."""

    plan: MergePlan
    inputs: Sequence[ModelReader]  # of the plan's sources
    base: ModelReader | None
    writer: ShardedWriter


class Buffers:
    """Every thread's own arrays, reused: fresh memory for every piece costs more than sums."""

    def __init__(self) -> None:
        self._local = local()

    def array(self, purpose: object, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """This thread's array [elements] for a purpose, with whatever is in it."""
        arrays: dict[tuple[object, torch.dtype], torch.Tensor] = self._local.__dict__.setdefault("arrays", {})
        array = arrays.get((purpose, dtype))
        if array is None or array.numel() < elements:
            arrays[purpose, dtype] = array = torch.empty(elements, dtype=dtype)
        return array if array.numel() == elements else array[:elements]

    def stored(self, model: ModelReader, part: Unit, purpose: object = "stored") -> torch.Tensor:
        """A part of a model, in the type in which it is stored."""
        out = self.array(purpose, part.stop - part.start, model.spec(part.name).dtype)
        model.read_into(part.name, part.start, out)
        return out

    def widened(self, stored: torch.Tensor, purpose: object) -> torch.Tensor:
        """In float64: converted apart from the arithmetic, which on mixed types is slower than both."""
        return self.array(purpose, stored.numel(), torch.float64).copy_(stored)


def parts_of(unit: Unit, step: int) -> list[Unit]:
    """A unit in parts of `step` elements."""
    step = max(step, 1)
    return [Unit(unit.name, i, min(i + step, unit.stop)) for i in range(unit.start, unit.stop, step)]


class UnitRunner:
    """Merges, writes and hashes one unit of a target by its method; safe to call from several threads."""

    def __init__(self, target: Target, chunk_bytes: int) -> None:
        self.targets, self.chunk_bytes = [target], chunk_bytes
        self._target, self._buffers = target, Buffers()

    def __call__(self, unit: Unit) -> tuple[Unit, list[list[str]]]:
        """The unit, and the hashes of its blocks for each target."""
        target, hashes = self._target, BlockHashes()
        position, dtype = unit.start, target.plan.specs[unit.name].dtype
        for merged in self._merged(unit):
            rounded = self._buffers.array("output", merged.numel(), dtype).copy_(merged.reshape(-1))
            target.writer.write_range(unit.name, position, rounded)
            hashes.update(rounded)
            position += rounded.numel()
        return unit, [hashes.finished()]

    def _merged(self, unit: Unit) -> Iterator[torch.Tensor]:
        """The unit's pieces in their order, each of which is valid until the next is taken."""
        target, plan = self._target, self._target.plan
        spec = plan.specs[unit.name]
        parts = parts_of(unit, self.chunk_bytes // spec.dtype.itemsize)
        if plan.copies(unit.name):
            yield from (self._buffers.stored(target.inputs[0], part) for part in parts)
        elif plan.method.elementwise:
            merge = functools.partial(plan.method.function, **plan.parameters)
            yield from (merge(self._piece(part)) for part in parts)
        else:
            whole = Whole(spec.shape, lambda: self._pieces_of_rows(unit.name, spec.shape))
            yield from map(plan.method.prepare(whole, plan.parameters), whole)

    def _pieces_of_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """A tensor in pieces of whole rows, which depend on its shape alone; a vector is one."""
        row = math.prod(shape[1:])
        rows = max(1, _ROWS_ELEMENTS // max(row, 1)) if len(shape) > 1 else max(shape, default=1)
        for first in range(0, shape[0] if shape else 1, rows):
            taken = min(rows, shape[0] - first) if shape else 1
            part = Unit(name, first * row, (first + taken) * row)
            yield self._piece(part, (taken, *shape[1:]) if shape else ())

    def _piece(self, part: Unit, shape: tuple[int, ...] | None = None) -> Piece:
        """Flat, or in a shape."""
        target, plan = self._target, self._target.plan

        def shaped(flat: torch.Tensor) -> torch.Tensor:
            return flat if shape is None else flat.reshape(shape)

        def noise(i: int) -> torch.Tensor:
            key = f"{plan.seed}/{part.name}/{plan.sources[i].sample}"
            return shaped(uniform(key, part.start, part.stop))

        zeros = self._buffers.array("result", part.stop - part.start, torch.float64).zero_()
        return Piece(
            tensors=(shaped(self._read(model, part, "input")) for model in target.inputs),
            weights=[source.weight for source in plan.sources],
            zeros=shaped(zeros),
            base=shaped(self._read(target.base, part, "base")) if target.base else None,
            noise=noise,
        )

    def _read(self, model: ModelReader, part: Unit, purpose: str) -> torch.Tensor:
        return self._buffers.widened(self._buffers.stored(model, part), purpose)
