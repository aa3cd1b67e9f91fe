"""Compute a merge into one output, unit by unit."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import local

from btm_scale.checkpoint.formats.rounded import Counts, count_nonfinite
from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.hashing import BLOCK_BYTES, BlockHashes
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.checkpoint.merge.plan import MergePlan, Unit
from btm_scale.checkpoint.merge.registry import Piece, TensorPieces
from btm_scale.util.imports import torch

_ROWS_ELEMENTS = 1 << 15  # in a piece of rows; torch sums this many in one order for any number of threads


@dataclass(frozen=True)
class Target:
    """One output: its plan, its open inputs and its writer."""

    plan: MergePlan
    inputs: Sequence[ModelReader]  # in the order of the plan's sources
    base: ModelReader | None
    writer: ShardedWriter
    nonfinite: dict[Unit, list[Counts]] = field(default_factory=dict)  # of the units that have such elements

    def count(self, unit: Unit, exact: torch.Tensor, rounded: torch.Tensor) -> None:
        """Count what is not finite in a piece of a unit."""
        if counts := count_nonfinite(exact, rounded):
            self.nonfinite.setdefault(unit, []).append(counts)

    @property
    def everyone(self) -> Sequence[ModelReader]:
        """All open models, in the order of the plan's `everyone`."""
        return [*self.inputs, *([self.base] if self.base else [])]


class Buffers:
    """Reusable arrays per thread: allocating memory for every piece costs more than the sums."""

    def __init__(self) -> None:
        self._local = local()

    def array(self, purpose: object, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Return this thread's uninitialized array [elements] for a purpose."""
        arrays: dict[tuple[object, torch.dtype], torch.Tensor] = self._local.__dict__.setdefault("arrays", {})
        array = arrays.get((purpose, dtype))
        if array is None or array.numel() < elements:
            arrays[purpose, dtype] = array = torch.empty(elements, dtype=dtype)
        return array if array.numel() == elements else array[:elements]

    def stored(self, model: ModelReader, part: Unit, purpose: object = "stored") -> torch.Tensor:
        """Return a part of a model in its stored dtype."""
        out = self.array(purpose, part.stop - part.start, model.exact_dtype(part.name))
        model.read_into(part.name, part.start, out)
        return out

    def widened(self, stored: torch.Tensor, purpose: object) -> torch.Tensor:
        """Return a float64 copy: converting first is faster than arithmetic on mixed dtypes."""
        return self.array(purpose, stored.numel(), torch.float64).copy_(stored)


def kept_hash(target: Target, unit: Unit) -> str | None:
    """Return the hash of a unit that is a copy of one block of an input, if that input has kept the hash."""
    plan, spec = target.plan, target.plan.specs[unit.name]
    how = plan.how(unit.name)
    if not how.models or not plan.copies(unit.name):
        return None
    model, name = target.everyone[how.models[0]], how.names[0]
    hashes = model.kept_hashes(name)
    elements = BLOCK_BYTES // spec.itemsize
    number, rest = divmod(unit.start, elements)
    is_block = not rest and unit.stop == min(unit.start + elements, spec.elements) and model.spec(name) == spec
    return hashes[number] if hashes is not None and is_block and number < len(hashes) else None


def parts_of(unit: Unit, step: int, skipped: int = 0) -> list[Unit]:
    """Split a unit into parts of `step` elements, as if it were preceded by `skipped` elements of no part."""
    step = max(step, 1)
    starts = range(unit.start - skipped % step, unit.stop, step)
    return [Unit(unit.name, max(i, unit.start), min(i + step, unit.stop)) for i in starts]


class UnitRunner:
    """Merges, writes and hashes one unit of a target by its method; thread-safe."""

    def __init__(self, target: Target, chunk_bytes: int) -> None:
        self.targets, self.chunk_bytes = [target], chunk_bytes
        self._target, self._buffers = target, Buffers()

    def __call__(self, unit: Unit) -> tuple[Unit, list[list[str]]]:
        """Return the unit and, per target, its block hashes."""
        target, hashes, kept = self._target, BlockHashes(), kept_hash(self._target, unit)
        position, dtype = unit.start, target.plan.specs[unit.name].dtype
        for merged in self._merged(unit):
            rounded = merged.reshape(-1).contiguous()
            if rounded.dtype != dtype:
                rounded = self._buffers.array("output", merged.numel(), dtype).copy_(rounded)
            target.count(unit, merged, rounded)
            target.writer.write_range(unit.name, position, rounded)
            if kept is None:
                hashes.update(rounded)
            position += rounded.numel()
        return unit, [hashes.finished() if kept is None else [kept]]

    def _merged(self, unit: Unit) -> Iterator[torch.Tensor]:
        """Yield the unit's merged pieces in order, each valid until the next is taken."""
        target, plan = self._target, self._target.plan
        spec = plan.specs[unit.name]
        parts = parts_of(unit, self.chunk_bytes // spec.itemsize) if plan.how(unit.name).models else [unit]
        how = plan.how(unit.name)
        if not how.models:
            yield torch.from_numpy(plan.added(unit))
        elif plan.copies(unit.name):
            model = target.everyone[how.models[0]]
            yield from (self._buffers.stored(model, _named(part, how.names[0])) for part in parts)
        elif how.method.elementwise:
            merge = functools.partial(how.method.function, **how.parameters)
            yield from (merge(self._piece(part)) for part in parts)
        else:
            pieces = TensorPieces(spec.shape, lambda: self._pieces_of_rows(unit.name, spec.shape))
            yield from map(how.method.prepare(pieces, how.parameters), pieces)

    def _pieces_of_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """Yield a tensor in pieces of complete rows, which depend only on its shape; a vector is one piece."""
        row = math.prod(shape[1:])
        rows = max(1, _ROWS_ELEMENTS // max(row, 1)) if len(shape) > 1 else max(shape, default=1)
        for first in range(0, shape[0] if shape else 1, rows):
            taken = min(rows, shape[0] - first) if shape else 1
            part = Unit(name, first * row, (first + taken) * row)
            yield self._piece(part, (taken, *shape[1:]) if shape else ())

    def _piece(self, part: Unit, shape: tuple[int, ...] | None = None) -> Piece:
        """Return a part as a piece, flat unless `shape` is given."""
        plan, models = self._target.plan, self._target.everyone
        how = plan.how(part.name)

        def shaped(flat: torch.Tensor) -> torch.Tensor:
            return flat if shape is None else flat.reshape(shape)

        def noise(i: int) -> torch.Tensor:
            key = plan.noise_key(part.name, i)
            return shaped(torch.from_numpy(uniform(key, part.start, part.stop)))

        def read(model: int, name: str, purpose: str) -> torch.Tensor:
            return shaped(self._buffers.widened(self._buffers.stored(models[model], _named(part, name)), purpose))

        zeros = self._buffers.array("result", part.stop - part.start, torch.float64).zero_()
        return Piece(
            tensors=(read(model, name, "input") for model, name in zip(how.models, how.names, strict=True)),
            weights=how.weights,
            zeros=shaped(zeros),
            base=read(*how.base, "base") if how.base else None,
            noise=noise,
        )


def _named(part: Unit, name: str) -> Unit:
    """Return the same elements of another tensor."""
    return part if name == part.name else Unit(name, part.start, part.stop)
