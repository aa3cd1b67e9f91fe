"""What a merge will do, with every problem told before the first byte is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, parse_dtype
from btm_scale.checkpoint.hashing import BLOCK_BYTES, sample_hash
from btm_scale.checkpoint.merge import elementwise, whole_tensor  # noqa: F401 (they register their methods)
from btm_scale.checkpoint.merge.compatibility import common_specs, config_problems, tokenizer_problems
from btm_scale.checkpoint.merge.registry import Method, find_method
from btm_scale.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """One model that goes into a merge.

    `sample` tells its content apart from other models', `files` its files from what they were at another time.
    """

    path: Path
    weight: float
    sample: str
    files: str


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

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a pool pickles a plan in a thread of its own, while this one may be finding its units."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def method(self) -> Method:
        """The registered method."""
        return find_method(self.method_name)

    @property
    def everyone(self) -> tuple[Source, ...]:
        """All models that are read."""
        return (*self.sources, *([self.base] if self.base else []))

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
        specs = {name: str(spec) for name, spec in self.specs.items()}
        decides = [self.everyone, self.method_name, self.parameters, specs, self.max_shard_bytes, self.seed]
        return hashlib.sha256(repr(decides).encode()).hexdigest()

    def copies(self, name: str) -> bool:
        """Whether a tensor is taken over as it is: it is no float, or there is one model only."""
        return not self.specs[name].dtype.is_floating_point or (len(self.sources) == 1 and self.method_name == "linear")

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
    tensors: Sequence[str] | None = None,
) -> MergePlan:
    """Check everything about a merge; raises one `CheckpointError` that tells every problem found.

    With `tensors` these alone are merged, and the models' configs and tokenizers are not compared.
    """
    chosen = find_method(method)
    used = _taking_part(chosen, inputs)
    problems = _weight_problems(chosen, used) + _parameter_problems(chosen, parameters or {})
    if chosen.needs_base and base is None:
        problems.append(f"'{method}' needs the model that all inputs were trained from. Name it as base.")
    basis = [Path(base)] if base is not None and chosen.needs_base else []
    paths = [*(path for path, _ in used), *basis]
    models = _checked(paths, parse_dtype(dtype) if dtype else None, problems, tensors)
    settings = {**chosen.parameters, **(parameters or {})}
    origin = models.source(basis[0], 0.0) if basis else None
    return models.plan(used, origin, method, settings, max_shard_bytes, seed)


def plan_means(
    outputs: Sequence[Sequence[tuple[Path, float]]], *, dtype: str | None = None, max_shard_bytes: float
) -> list[MergePlan]:
    """Plans of method `linear` for several outputs; every model is looked at once. Raises as `make_plan` does."""
    linear = find_method("linear")
    each = [_taking_part(linear, inputs) for inputs in outputs]
    problems = [problem for used in each for problem in _weight_problems(linear, used)]
    paths = list(dict.fromkeys(path for used in each for path, _ in used))
    models = _checked(paths, parse_dtype(dtype) if dtype else None, problems)
    return [models.plan(used, None, "linear", {}, max_shard_bytes, 0) for used in each]


@dataclass(frozen=True)
class _Models:
    """Models that may be merged with one another: what any plan of them needs to know."""

    specs: Mapping[str, TensorSpec]
    samples: Mapping[Path, str]
    files: Mapping[Path, str]
    bytes_read: Mapping[Path, int]

    def source(self, path: Path, weight: float) -> Source:
        return Source(path, weight, self.samples[path], self.files[path])

    def plan(
        self,
        inputs: Sequence[tuple[Path, float]],
        base: Source | None,
        method: str,
        parameters: Mapping[str, float],
        max_shard_bytes: float,
        seed: int,
    ) -> MergePlan:
        sources = [self.source(path, weight) for path, weight in inputs]
        # Content first: then all means of the same models add them in one order, and can be made together.
        sources.sort(key=lambda source: (source.sample, source.weight, str(source.path.resolve())))
        read = sum(self.bytes_read[source.path] for source in [*sources, *([base] if base else [])])
        return MergePlan(tuple(sources), base, method, parameters, self.specs, max_shard_bytes, seed, read)


def _taking_part(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[tuple[Path, float]]:
    return [(Path(path), float(weight)) for path, weight in inputs if weight or method.name != "linear"]


def _checked(
    paths: Sequence[Path], dtype: torch.dtype | None, problems: list[str], tensors: Sequence[str] | None = None
) -> _Models:
    """Open every model and compare them; raises one `CheckpointError` with `problems` and all that are found here."""
    problems = list(problems)
    with ExitStack() as stack:
        readers: list[ModelReader] = []
        for path in paths:
            try:
                readers.append(stack.enter_context(open_model(path)))
            except CheckpointError as error:
                problems.append(str(error))
        problems += [
            f"{reader.path} holds no tensor under a name. Save the model itself, not a dictionary that holds it."
            for reader in readers
            if not reader.names
        ]
        specs: dict[str, TensorSpec] = {}
        if len(readers) == len(paths) and readers:
            specs, found = common_specs(readers, dtype, tensors)
            problems += found
            if tensors is None:
                problems += config_problems(paths) + tokenizer_problems(paths)
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"these models cannot be merged, and nothing was written:\n{listing}")
        named = dict(zip(paths, readers, strict=True))
        return _Models(
            specs,
            {path: sample_hash(reader) for path, reader in named.items()},
            {path: _state_of_files(path) for path in named},
            {path: sum(reader.spec(name).nbytes for name in specs) for path, reader in named.items()},
        )


def _state_of_files(path: Path) -> str:
    """Changes with the name, size or time of any file of a model.

    An editor's lock is a link to nowhere; an output may be made inside the folder of a model.
    """
    files = [
        (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for file in sorted(path.rglob("*") if path.is_dir() else [path])
        if file.is_file() and ".partial" not in str(file.relative_to(path))
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _weight_problems(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[str]:
    weights = [weight for _, weight in inputs]
    problems = []
    if not inputs:
        problems.append("no input has a weight other than 0. Give at least one model.")
    elif not math.isfinite(sum(map(abs, weights))):
        problems.append(f"weights and their sum must be finite numbers; they are {weights}.")
    elif method.name in ("linear", "slerp") and abs(sum(weights)) <= 1e-12 * sum(map(abs, weights)):
        problems.append(f"weights must not sum to 0, since the result is divided by the sum; they are {weights}.")
    if method.exactly is not None and len(inputs) != method.exactly:
        problems.append(f"'{method.name}' merges exactly {method.exactly} models and {len(inputs)} were given.")
    if not method.weighted and len(set(weights)) > 1:
        problems.append(f"'{method.name}' finds its weights itself: leave out {weights}, or use another method.")
    return problems


def _parameter_problems(method: Method, parameters: Mapping[str, float]) -> list[str]:
    known = method.parameters
    offered = ", ".join(f"{name} (default {value})" for name, value in known.items()) or "none"
    problems = [
        f"'{method.name}' has no parameter '{name}'. It has: {offered}." for name in parameters if name not in known
    ]
    settings = {**known, **parameters}
    problems += [
        f"'{method.name}' needs a finite number for '{name}', not {value}. Leave it out for {known[name]}."
        for name, value in settings.items()
        if name in known and not math.isfinite(value)
    ]
    density, half = settings.get("density", 1.0), settings.get("window", 0.0) / 2
    if not 0 < density - half <= density + half <= 1:
        problems.append(
            f"'{method.name}' would keep {density - half:g} to {density + half:g} of the elements; both must "
            "lie above 0 and not above 1. Change density or window."
        )
    return problems
