"""Plan a merge: every problem is reported before the first byte is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, parse_dtype
from btm_scale.checkpoint.hashing import BLOCK_BYTES, sample_hash
from btm_scale.checkpoint.merge import elementwise, fusion, sparse, spherical, whole_tensor  # noqa: F401 (they register their methods)
from btm_scale.checkpoint.merge.compatibility import (
    LAYER_KEYS,
    common_specs,
    config_problems,
    tokenizer_problems,
)
from btm_scale.checkpoint.merge.registry import METHODS, Method, PerModel, find_method
from btm_scale.checkpoint.merge.settings import parameter_problems, weight_problems
from btm_scale.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """One input model of a merge.

    `sample` is a hash that distinguishes models by content, `files` one that changes when the model's files change.
    """

    path: Path
    weight: float
    sample: str
    files: str


@dataclass(frozen=True)
class Unit:
    """Elements `[start, stop)` of one tensor, merged, hashed and recorded as one step."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class TensorMerge:
    """How one tensor is merged: which tensors of which models are read, by which method.

    `models` and the first entry of `base` are indices into the plan's `everyone`.
    """

    method_name: str
    parameters: Mapping[str, PerModel]
    models: tuple[int, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    base: tuple[int, str] | None

    @property
    def method(self) -> Method:
        """The registered method."""
        return find_method(self.method_name)

    @property
    def is_copy(self) -> bool:
        """Whether the result is the only model's tensor."""
        if len(self.models) != 1:
            return False
        settings = {**self.method.parameters, **self.parameters}
        kept = {"linear": settings.get("normalize") == 1, "passthrough": settings.get("scale") in (1, (1,))}
        return kept.get(self.method_name, False)


@dataclass(frozen=True)
class MergePlan:
    """Everything that determines the bytes of a merge; it can be sent to other processes.

    The order of `sources` depends on their content and weights, not on the order of the arguments. `tensors` has an
    entry for every tensor if they are not all merged alike; the sources' weights then have no meaning. `layers` is set
    if layers are stacked: for each layer of the output a source, by its index, and the number of the layer there.
    """

    sources: tuple[Source, ...]
    base: Source | None
    method_name: str
    parameters: Mapping[str, float]
    specs: Mapping[str, TensorSpec]
    max_shard_bytes: float
    seed: int
    bytes_read: int
    tensors: Mapping[str, TensorMerge] = field(default_factory=dict)
    layers: tuple[tuple[int, int], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields only: a pool pickles a plan in another thread, while this one may be caching `units`."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def method(self) -> Method:
        """The registered method."""
        return find_method(self.method_name)

    @property
    def everyone(self) -> tuple[Source, ...]:
        """All models that are read, the base included."""
        return (*self.sources, *([self.base] if self.base else []))

    @cached_property
    def units(self) -> list[Unit]:
        """All units, in the order of the output's tensors; units begin at block boundaries of the content hash."""
        return [unit for name in self.specs for unit in self._units_of(name)]

    @property
    def is_large(self) -> bool:
        """Whether the merge is worth several processes."""
        return self.bytes_read > 1 << 28

    def fingerprint(self) -> str:
        """Return a hash that changes with anything that could change a byte of the output, input files included."""
        specs = {name: str(spec) for name, spec in self.specs.items()}
        settings = [self.everyone, self.method_name, self.parameters, specs, self.max_shard_bytes, self.seed]
        if self.tensors:
            settings.append(self.tensors)
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def how(self, name: str) -> TensorMerge:
        """Return how a tensor is merged."""
        if self.tensors:
            return self.tensors[name]
        count = len(self.sources)
        weights = tuple(source.weight for source in self.sources)
        base = (count, name) if self.base else None
        return TensorMerge(self.method_name, self.parameters, tuple(range(count)), (name,) * count, weights, base)

    def copies(self, name: str) -> bool:
        """Whether a tensor is copied unchanged: it is not floating-point, or there is only one model."""
        return not self.specs[name].dtype.is_floating_point or self.how(name).is_copy

    def _units_of(self, name: str) -> Iterator[Unit]:
        spec = self.specs[name]
        undivided = not self.how(name).method.elementwise and not self.copies(name)
        step = spec.elements if undivided else BLOCK_BYTES // spec.dtype.itemsize
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
    """Check a merge and return its plan. Raises one `CheckpointError` that lists every problem.

    With `tensors` only these are merged, and the models' configs and tokenizers are not compared.
    """
    chosen = find_method(method)
    used = _used_inputs(chosen, inputs)
    problems = weight_problems(chosen, used) + parameter_problems(chosen, parameters or {})
    if chosen.needs_base and base is None:
        problems.append(
            f"'{method}' needs a base: the model from which all inputs were trained. Give it (--base DIR; `base` in "
            "Python)."
        )
    if base is not None and not chosen.takes_base:
        others = ", ".join(name for name, other in sorted(METHODS.items()) if other.takes_base)
        problems.append(f"'{method}' takes no base. Leave {base} out, or use a method that takes one: {others}.")
    basis = [Path(base)] if base is not None and chosen.takes_base else []
    paths = [*(path for path, _ in used), *basis]
    models = checked_models(paths, parse_dtype(dtype) if dtype else None, problems, tensors)
    settings = {**chosen.parameters, **(parameters or {})}
    origin = models.source(basis[0], 0.0) if basis else None
    return models.plan(used, origin, method, settings, max_shard_bytes, seed)


def plan_means(
    outputs: Sequence[Sequence[tuple[Path, float]]], *, dtype: str | None = None, max_shard_bytes: float
) -> list[MergePlan]:
    """Return plans of method `linear` for several outputs, checking every model once. Raises like `make_plan`."""
    linear = find_method("linear")
    per_output = [_used_inputs(linear, inputs) for inputs in outputs]
    problems = [problem for used in per_output for problem in weight_problems(linear, used)]
    paths = list(dict.fromkeys(path for used in per_output for path, _ in used))
    models = checked_models(paths, parse_dtype(dtype) if dtype else None, problems)
    return [models.plan(used, None, "linear", {}, max_shard_bytes, 0) for used in per_output]


@dataclass(frozen=True)
class Models:
    """Facts about compatible models that any plan of them needs."""

    specs: Mapping[str, TensorSpec]
    samples: Mapping[Path, str]
    files: Mapping[Path, str]
    bytes_read: Mapping[Path, int]

    def source(self, path: Path, weight: float) -> Source:
        """Return a model as a source."""
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
        """Return the plan of one output."""
        sources = [self.source(path, weight) for path, weight in inputs]
        # Content first: all means of the same models then add them in one order, and can be computed together.
        sources.sort(key=lambda source: (source.sample, source.weight, str(source.path.resolve())))
        read = sum(self.bytes_read[source.path] for source in [*sources, *([base] if base else [])])
        return MergePlan(tuple(sources), base, method, parameters, self.specs, max_shard_bytes, seed, read)


def _used_inputs(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[tuple[Path, float]]:
    return [(Path(path), float(weight)) for path, weight in inputs if weight or method.name != "linear"]


def checked_models(
    paths: Sequence[Path],
    dtype: torch.dtype | None,
    problems: list[str],
    tensors: Sequence[str] | None = None,
    stacked: Callable[[Sequence[ModelReader]], tuple[dict[str, TensorSpec], list[str]]] | None = None,
) -> Models:
    """Open and compare all models. Raises one `CheckpointError` that lists `problems` and any found here.

    `stacked` returns the output's specs, and problems, of a merge whose models may have different numbers of layers.
    """
    problems = list(problems)
    with ExitStack() as stack:
        readers: list[ModelReader] = []
        for path in paths:
            try:
                readers.append(stack.enter_context(open_model(path)))
            except CheckpointError as error:
                problems.append(str(error))
        problems += [
            f"{reader.path} has no named tensors. Save the model's state dict itself, not a dictionary around it."
            for reader in readers
            if not reader.names
        ]
        specs: dict[str, TensorSpec] = {}
        if len(readers) == len(paths) and readers:
            # The configs' sizes come first: they explain most differences between tensors.
            if tensors is None:
                problems += config_problems(paths, ignoring=LAYER_KEYS if stacked else ()) + tokenizer_problems(paths)
            specs, differences = stacked(readers) if stacked else common_specs(readers, dtype, tensors)
            problems += differences
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"Cannot merge these models. Nothing was written:\n{listing}")
        by_path = dict(zip(paths, readers, strict=True))
        return Models(
            specs,
            {path: sample_hash(reader) for path, reader in by_path.items()},
            {path: _files_hash(path) for path in by_path},
            {
                path: reader.nbytes_as(None) if stacked else sum(reader.spec(name).nbytes for name in specs)
                for path, reader in by_path.items()
            },
        )


def _files_hash(path: Path) -> str:
    """Return a hash that changes with the name, size or modification time of any file of a model.

    Dangling links (editor locks) and partial outputs inside the model's folder are ignored.
    """
    files = [
        (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for file in sorted(path.rglob("*") if path.is_dir() else [path])
        if file.is_file() and ".partial" not in str(file.relative_to(path))
    ]
    return hashlib.sha256(repr(files).encode()).hexdigest()
