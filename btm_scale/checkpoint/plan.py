"""What a merge will do, with every problem told before the first byte is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from btm_scale.checkpoint.compatibility import common_specs, config_problems, tokenizer_problems
from btm_scale.checkpoint.formats import open_model
from btm_scale.checkpoint.hashing import BLOCK_BYTES, sample_hash
from btm_scale.checkpoint.methods import Method, find_method
from btm_scale.checkpoint.tensors import ModelReader, TensorSpec, parse_dtype
from btm_scale.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """One model that goes into a merge. `sample` tells its content apart from other models'."""

    path: Path
    weight: float
    sample: str


@dataclass(frozen=True)
class Unit:
    """Elements `[start, stop)` of one tensor: what is merged, hashed and noted as done in one go."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class MergePlan:
    """Everything that decides the bytes of a merge; it can be sent to other processes.

    `sources` are in an order that depends on weights and content and not on how they were given.
    """

    sources: tuple[Source, ...]
    base: Source | None
    method_name: str
    parameters: Mapping[str, float]
    specs: Mapping[str, TensorSpec]
    max_shard_bytes: float
    seed: int
    bytes_read: int

    @property
    def method(self) -> Method:
        """The registered method."""
        return find_method(self.method_name)

    @cached_property
    def units(self) -> list[Unit]:
        """The work, in the order of the output's tensors; every cut is at a block of the content hash."""
        return [unit for name in self.specs for unit in self._units_of(name)]

    @property
    def is_large(self) -> bool:
        """Whether there is enough to do for several processes."""
        return self.bytes_read > 1 << 28

    def fingerprint(self) -> str:
        """Changes with anything that could change a byte of the output, inputs' files included."""
        everyone = [*self.sources, *([self.base] if self.base else [])]
        files = [
            (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
            for source in everyone
            for file in sorted(source.path.rglob("*") if source.path.is_dir() else [source.path])
        ]
        specs = {name: str(spec) for name, spec in self.specs.items()}
        decides = [everyone, self.method_name, self.parameters, specs, self.max_shard_bytes, self.seed, files]
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def copies(self, name: str) -> bool:
        """Whether a tensor is taken over as it is: it is no float, or there is one model only."""
        return not self.specs[name].dtype.is_floating_point or (
            len(self.sources) == 1 and self.method_name == "linear"
        )

    def _units_of(self, name: str) -> Iterator[Unit]:
        spec = self.specs[name]
        whole = not self.method.elementwise and not self.copies(name)
        step = spec.elements if whole else BLOCK_BYTES // spec.dtype.itemsize
        for start in range(0, spec.elements, max(step, 1)):
            yield Unit(name, start, min(start + step, spec.elements))


def make_plan(
    inputs: Sequence[tuple[Path, float]],
    *,
    method: str,
    parameters: Mapping[str, float] | None,
    base: Path | None,
    dtype: str | None,
    max_shard_bytes: float,
    seed: int,
) -> MergePlan:
    """Check everything about a merge; raises one `CheckpointError` that tells every problem found."""
    problems: list[str] = []
    chosen = find_method(method)
    used = [(Path(path), float(weight)) for path, weight in inputs if weight or method != "linear"]
    problems += _weight_problems(chosen, used) + _parameter_problems(chosen, parameters or {})
    if chosen.needs_base and base is None:
        problems.append(f"'{method}' needs the model that all inputs were trained from. Name it as base.")
    paths = [path for path, _ in used] + ([Path(base)] if base is not None and chosen.needs_base else [])
    readers: list[ModelReader] = []
    for path in paths:
        try:
            readers.append(open_model(path))
        except CheckpointError as error:
            problems.append(str(error))
    try:
        specs: dict[str, TensorSpec] = {}
        if len(readers) == len(paths) and readers:
            specs, found = common_specs(readers, parse_dtype(dtype) if dtype else None)
            problems += found + config_problems(paths) + tokenizer_problems(paths)
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"these models cannot be merged, and nothing was written:\n{listing}")
        weights = [weight for _, weight in used] + [0.0] * (len(paths) - len(used))
        bytes_read = sum(reader.spec(name).nbytes for reader in readers for name in specs)
        sources = [
            Source(path, weight, sample_hash(reader))
            for path, weight, reader in zip(paths, weights, readers, strict=True)
        ]
    finally:
        for reader in readers:
            reader.close()
    origin = sources.pop() if chosen.needs_base else None
    sources.sort(key=lambda source: (source.weight, source.sample, str(source.path.resolve())))
    settings = {**chosen.parameters, **(parameters or {})}
    return MergePlan(tuple(sources), origin, method, settings, specs, max_shard_bytes, seed, bytes_read)


def _weight_problems(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[str]:
    weights = [weight for _, weight in inputs]
    problems = []
    if not inputs:
        problems.append("no input has a weight other than 0. Give at least one model.")
    elif not all(map(math.isfinite, weights)):
        problems.append(f"weights must be finite numbers and are {weights}.")
    elif method.name in ("linear", "slerp") and math.isclose(sum(weights), 0, abs_tol=1e-12):
        problems.append(
            f"weights must not sum to 0, since the result is divided by the sum; they are {weights}."
        )
    if method.exactly is not None and len(inputs) != method.exactly:
        problems.append(
            f"'{method.name}' merges exactly {method.exactly} models and {len(inputs)} were given."
        )
    if not method.weighted and len(set(weights)) > 1:
        problems.append(
            f"'{method.name}' finds its weights itself: leave out {weights}, or use another method."
        )
    return problems


def _parameter_problems(method: Method, parameters: Mapping[str, float]) -> list[str]:
    known = method.parameters
    offered = ", ".join(f"{name} (default {value})" for name, value in known.items()) or "none"
    problems = [
        f"'{method.name}' has no parameter '{name}'. It has: {offered}."
        for name in parameters
        if name not in known
    ]
    settings = {**known, **parameters}
    density, half = settings.get("density", 1.0), settings.get("window", 0.0) / 2
    if not 0 < density - half <= density + half <= 1:
        problems.append(
            f"'{method.name}' would keep {density - half:g} to {density + half:g} of the elements; both must "
            "lie above 0 and not above 1. Change density or window."
        )
    return problems
