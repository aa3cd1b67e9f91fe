"""The arithmetic of a merge: one unit of one output, or of several that are made of the same models."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import local

import torch

from btm_scale.checkpoint.hashing import BlockHashes
from btm_scale.checkpoint.noise import uniform
from btm_scale.checkpoint.plan import MergePlan, Unit
from btm_scale.checkpoint.registry import Piece, Whole
from btm_scale.checkpoint.sharded_writer import ShardedWriter
from btm_scale.checkpoint.tensors import ModelReader

_ROWS_ELEMENTS = 1 << 15  # in a piece of whole rows; torch sums so many in one order whatever the threads
_KEPT_BYTES = (
    8 << 20
)  # of the models' widened parts, where several outputs are made of them: what a core's cache holds


@dataclass(frozen=True)
class Target:
    """One output: what it shall be, what it is made of, and where its bytes go."""

    plan: MergePlan
    inputs: Sequence[ModelReader]  # of the plan's sources
    base: ModelReader | None
    writer: ShardedWriter


class UnitRunner:
    """Merges, writes and hashes one unit of every target; safe to call from several threads.

    Several targets have the same tensors and an elementwise method; each part of a model is then read once for all.
    """

    def __init__(self, targets: Sequence[Target], chunk_bytes: int) -> None:
        self.targets, self.chunk_bytes = targets, chunk_bytes
        self._models = len({id(model) for target in targets for model in target.inputs})
        self._local = local()

    def __call__(self, unit: Unit) -> tuple[Unit, list[list[str]]]:
        """The unit, and the hashes of its blocks for each target."""
        hashes = [BlockHashes() for _ in self.targets]
        steps = (self._steps(target, unit, own) for target, own in zip(self.targets, hashes, strict=True))
        inputs = self._inputs
        for _ in zip(*steps, strict=True):
            inputs.clear()
        return unit, [own.finished() for own in hashes]

    def _steps(self, target: Target, unit: Unit, hashes: BlockHashes) -> Iterator[None]:
        """Piece by piece, in step with the other targets."""
        position, dtype = unit.start, target.plan.specs[unit.name].dtype
        for merged in self._merged(target, unit):
            rounded = self._buffer("output", merged.numel(), dtype).copy_(merged.reshape(-1))
            target.writer.write_range(unit.name, position, rounded)
            hashes.update(rounded)
            position += rounded.numel()
            yield

    def _merged(self, target: Target, unit: Unit) -> Iterator[torch.Tensor]:
        """The unit's pieces in their order, each of which is valid until the next is taken."""
        plan, spec = target.plan, target.plan.specs[unit.name]
        step = max(1, self.chunk_bytes // spec.dtype.itemsize)
        if len(self.targets) > 1:
            step = min(step, max(1, _KEPT_BYTES // (8 * self._models)))
        parts = [Unit(unit.name, i, min(i + step, unit.stop)) for i in range(unit.start, unit.stop, step)]
        if plan.copies(unit.name):
            yield from (self._stored(target.inputs[0], part) for part in parts)
        elif plan.method.elementwise:
            merge = functools.partial(plan.method.function, **plan.parameters)
            yield from (merge(self._piece(target, part)) for part in parts)
        else:
            whole = Whole(spec.shape, lambda: self._pieces_of_rows(target, unit.name, spec.shape))
            yield from map(plan.method.prepare(whole, plan.parameters), whole)

    def _pieces_of_rows(self, target: Target, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """A tensor in pieces of whole rows, which depend on its shape alone; a vector is one."""
        row = math.prod(shape[1:])
        rows = max(1, _ROWS_ELEMENTS // max(row, 1)) if len(shape) > 1 else max(shape, default=1)
        for first in range(0, shape[0] if shape else 1, rows):
            taken = min(rows, shape[0] - first) if shape else 1
            part = Unit(name, first * row, (first + taken) * row)
            yield self._piece(target, part, (taken, *shape[1:]) if shape else ())

    def _piece(self, target: Target, part: Unit, shape: tuple[int, ...] | None = None) -> Piece:
        """Flat, or in a shape."""
        plan = target.plan

        def shaped(flat: torch.Tensor) -> torch.Tensor:
            return flat if shape is None else flat.reshape(shape)

        def noise(i: int) -> torch.Tensor:
            key = f"{plan.seed}/{part.name}/{plan.sources[i].sample}"
            return shaped(uniform(key, part.start, part.stop))

        return Piece(
            tensors=(shaped(self._input(model, part)) for model in target.inputs),
            weights=[source.weight for source in plan.sources],
            zeros=shaped(self._buffer("result", part.stop - part.start, torch.float64).zero_()),
            base=shaped(self._widened(target.base, part, "base")) if target.base else None,
            noise=noise,
        )

    @property
    def _inputs(self) -> dict[ModelReader, torch.Tensor]:
        """This thread's parts that wait for further targets."""
        inputs: dict[ModelReader, torch.Tensor] = self._local.__dict__.setdefault("inputs", {})
        return inputs

    def _input(self, model: ModelReader, part: Unit) -> torch.Tensor:
        """A part in float64. One target takes model after model; several take the same part of all in turn."""
        if len(self.targets) == 1:
            return self._widened(model, part, "input")
        inputs = self._inputs
        found = inputs.get(model)
        if found is None:
            found = inputs[model] = self._widened(model, part, model)
        return found

    def _widened(self, model: ModelReader, part: Unit, purpose: object) -> torch.Tensor:
        """Converted apart from the arithmetic, which on mixed types is slower than both."""
        stored = self._stored(model, part)
        return self._buffer(purpose, stored.numel(), torch.float64).copy_(stored)

    def _stored(self, model: ModelReader, part: Unit) -> torch.Tensor:
        out = self._buffer("stored", part.stop - part.start, model.spec(part.name).dtype)
        model.read_into(part.name, part.start, out)
        return out

    def _buffer(self, purpose: object, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """This thread's array for a purpose, reused: fresh memory for every piece costs more than sums."""
        arrays: dict[tuple[object, torch.dtype], torch.Tensor] = self._local.__dict__.setdefault("arrays", {})
        array = arrays.get((purpose, dtype))
        if array is None or array.numel() < elements:
            arrays[purpose, dtype] = array = torch.empty(elements, dtype=dtype)
        return array if array.numel() == elements else array[:elements]
