"""Plan a merge: every problem is reported before the first byte is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.completeness import problems_of
from btm_scale.checkpoint.formats.based import base_of, is_completed
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, parse_dtype
from btm_scale.checkpoint.hashing import BLOCK_BYTES, sample_hash
from btm_scale.checkpoint.merge import elementwise, whole_tensor  # noqa: F401 (they register their methods)
from btm_scale.checkpoint.merge.compatibility import common_specs, config_problems, tokenizer_problems
from btm_scale.checkpoint.merge.moe import Ingredients, Mixture, mixture_of
from btm_scale.checkpoint.merge.registry import METHODS, Method, find_method
from btm_scale.checkpoint.merge.towers import other_towers
from btm_scale.errors import CheckpointError, near_match


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
class MergePlan:
    """Everything that determines the bytes of a merge; it can be sent to other processes.

    The order of `sources` depends on their content and weights, not on the order of the arguments.
    """

    sources: tuple[Source, ...]
    base: Source | None
    method_name: str
    parameters: Mapping[str, float]
    specs: Mapping[str, TensorSpec]
    max_shard_bytes: float
    seed: int
    bytes_read: int
    first: Path | None = None  # the first input, from which `copied` are
    copied: frozenset[str] = frozenset()  # tensors outside the language model
    mixture: Mixture | None = None  # of method `moe`; its router is read from `base`

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields only: a pool pickles a plan in another thread, while this one may be caching `units`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
        settings += [self.first, sorted(self.copied)] if self.copied else []
        settings += [self.mixture] if self.mixture else []
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def copies(self, name: str) -> bool:
        """Whether a tensor is copied unchanged: it is not floating-point or of language, or there is only one model."""
        return (
            name in self.copied
            or not self.specs[name].dtype.is_floating_point
            or (len(self.sources) == 1 and self.method_name == "linear")
        )

    def copied_from(self, name: str) -> int:
        """Return the index of the source from which a tensor is copied."""
        return [source.path for source in self.sources].index(self.first) if name in self.copied and self.first else 0

    def _units_of(self, name: str) -> Iterator[Unit]:
        spec = self.specs[name]
        undivided = not self.method.elementwise and not self.copies(name)
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
    ingredients: Ingredients | None = None,
) -> MergePlan:
    """Check a merge and return its plan. Raises one `CheckpointError` that lists every problem.

    With `tensors` only these are merged, and the models' configs and tokenizers are not compared. `ingredients` are
    for the method `moe`.
    """
    chosen = find_method(method)
    used = _used_inputs(chosen, inputs)
    problems = _weight_problems(chosen, used) + _parameter_problems(chosen, parameters or {})
    if chosen.needs_base and base is None:
        problems.append(
            f"'{method}' needs a base: the model from which all inputs were trained. Give it (--base DIR; `base` in "
            "Python)."
        )
    if base is not None and not chosen.needs_base and not any(map(is_completed, (path for path, _ in used))):
        others = ", ".join(name for name, other in sorted(METHODS.items()) if other.needs_base)
        problems.append(f"'{method}' takes no base. Leave {base} out, or use a method that takes one: {others}.")
    basis = [Path(base)] if base is not None and chosen.needs_base else []
    paths = [*(path for path, _ in used), *basis]
    models = _checked(paths, parse_dtype(dtype) if dtype else None, problems, tensors)
    settings = {**chosen.parameters, **(parameters or {})}
    if ingredients is not None:
        return models.mixture_plan(used, ingredients, settings, max_shard_bytes, seed)
    origin = models.source(basis[0], 0.0) if basis else None
    return models.plan(used, origin, method, settings, max_shard_bytes, seed)


def plan_means(
    outputs: Sequence[Sequence[tuple[Path, float]]], *, dtype: str | None = None, max_shard_bytes: float
) -> list[MergePlan]:
    """Return plans of method `linear` for several outputs, checking every model once. Raises like `make_plan`."""
    linear = find_method("linear")
    per_output = [_used_inputs(linear, inputs) for inputs in outputs]
    problems = [problem for used in per_output for problem in _weight_problems(linear, used)]
    paths = list(dict.fromkeys(path for used in per_output for path, _ in used))
    models = _checked(paths, parse_dtype(dtype) if dtype else None, problems)
    return [models.plan(used, None, "linear", {}, max_shard_bytes, 0) for used in per_output]


@dataclass(frozen=True)
class _Models:
    """Facts about compatible models that any plan of them needs."""

    specs: Mapping[str, TensorSpec]
    samples: Mapping[Path, str]
    files: Mapping[Path, str]
    bytes_read: Mapping[Path, int]

    def source(self, path: Path, weight: float) -> Source:
        return Source(path, weight, self.samples[path], self.files[path])

    def mixture_plan(
        self,
        inputs: Sequence[tuple[Path, float]],
        ingredients: Ingredients,
        parameters: Mapping[str, float],
        max_shard_bytes: float,
        seed: int,
    ) -> MergePlan:
        """Return the plan of a mixture of experts, which are the MLPs of `inputs` in their order."""
        plan = self.plan(inputs, None, "moe", parameters, max_shard_bytes, seed)
        paths = [path for path, _ in inputs]
        mixture, specs = mixture_of(paths, self.specs, ingredients, parameters["top_k"])
        index = {source.path: i for i, source in enumerate(plan.sources)}
        router = ingredients.router
        return replace(
            plan,
            mixture=mixture.of_sources([index[path] for path in paths]),
            specs=specs,
            base=None if router is None else Source(router, 0.0, "", _files_hash(router)),
            copied=frozenset(),
        )

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
        # Content first: all means of the same models then add them in one order, and can be computed together.
        sources.sort(key=lambda source: (source.sample, source.weight, str(source.path.resolve())))
        read = sum(self.bytes_read[source.path] for source in [*sources, *([base] if base else [])])
        first = inputs[0][0]
        copied = other_towers(first, self.specs) if len(inputs) > 1 else frozenset()
        return MergePlan(
            tuple(sources), base, method, parameters, self.specs, max_shard_bytes, seed, read, first, copied
        )


def _used_inputs(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[tuple[Path, float]]:
    return [(path, float(weight)) for path, weight in inputs if weight or method.name != "linear"]


def _checked(
    paths: Sequence[Path], dtype: torch.dtype | None, problems: list[str], tensors: Sequence[str] | None = None
) -> _Models:
    """Open and compare all models. Raises one `CheckpointError` that lists `problems` and any found here."""
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
                problems += config_problems(paths) + tokenizer_problems(paths)
                problems += [problem for reader in readers for problem in problems_of(reader)]
            specs, differences = common_specs(readers, dtype, tensors)
            problems += differences
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"Cannot merge these models. Nothing was written:\n{listing}")
        by_path = dict(zip(paths, readers, strict=True))
        return _Models(
            specs,
            {path: sample_hash(reader) for path, reader in by_path.items()},
            {path: _files_hash(path) for path in by_path},
            {path: sum(reader.spec(name).nbytes for name in specs) for path, reader in by_path.items()},
        )


def _files_hash(path: Path) -> str:
    """Return a hash that changes with the name, size or modification time of any file of a model or of its base.

    Dangling links (editor locks) and partial outputs inside the model's folder are ignored.
    """
    base = base_of(path) if is_completed(path) else None
    files = [
        (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for file in sorted(path.rglob("*") if path.is_dir() else [path])
        if file.is_file() and ".partial" not in str(file.relative_to(path))
    ]
    completing = [] if base is None else [_files_hash(base)]
    return hashlib.sha256(repr([*files, *completing]).encode()).hexdigest()


def _weight_problems(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[str]:
    weights = [weight for _, weight in inputs]
    problems = []
    if not inputs:
        problems.append("No input has a nonzero weight. Give at least one input a nonzero weight.")
    elif not math.isfinite(sum(map(abs, weights))):
        problems.append(f"The weights are {weights}. They and their sum must be finite.")
    elif method.name in ("linear", "slerp", "moe") and abs(sum(weights)) <= 1e-12 * sum(map(abs, weights)):
        problems.append(f"The weights {weights} sum to 0. '{method.name}' divides by their sum: change a weight.")
    if method.exactly is not None and len(inputs) != method.exactly:
        problems.append(f"'{method.name}' merges exactly {method.exactly} models, but {len(inputs)} were given.")
    if not method.weighted and len(set(weights)) > 1:
        problems.append(f"'{method.name}' computes its own weights. Leave out {weights}, or use another method.")
    return problems


def _parameter_problems(method: Method, parameters: Mapping[str, float]) -> list[str]:
    defaults = method.parameters
    choices = ", ".join(f"{name} (default {value:g})" for name, value in defaults.items())
    remedy = f"Its parameters are: {choices}." if defaults else "It takes no parameters: leave it out."
    problems = [
        f"'{method.name}' has no parameter '{name}'.{near_match(name, list(defaults))} {remedy}"
        for name in parameters
        if name not in defaults
    ]
    settings = {**defaults, **parameters}
    problems += [
        f"'{name}' of '{method.name}' is {value}. It must be finite: leave it out for the default, {defaults[name]}."
        for name, value in settings.items()
        if name in defaults and not math.isfinite(value)
    ]
    density, half = settings.get("density", 1.0), settings.get("window", 0.0) / 2
    if not 0 < density - half <= density + half <= 1:
        windowed = "window" in defaults
        kept = f"{density - half:g} to {density + half:g}" if windowed else f"{density:g}"
        problems.append(
            f"'{method.name}' would keep a fraction of {kept} of the elements. {'Both' if windowed else 'It'} must be "
            f"above 0 and at most 1: change {'density or window' if windowed else 'density'}."
        )
    return problems
