"""What determines the bytes of a merge: its models, how each tensor is merged, and the units of work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.checkpoint.hashing import BLOCK_BYTES
from btm_scale.checkpoint.merge import elementwise, fusion, sparse, spherical, whole_tensor  # noqa: F401 (they register their methods)
from btm_scale.checkpoint.merge.moe import ComputedRouter, Mixture, drawn
from btm_scale.checkpoint.merge.registry import Method, PerModel, find_method
from btm_scale.checkpoint.merge.views import Views
from btm_scale.util.snapshot import Snapshot


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

    `models` and the first entry of `base` are indices into the plan's `everyone`. No model: a tensor that a mixture
    adds, uniform random numbers below the only weight in size, or without a weight a gate of its computed router.
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
    first: Path | None = None  # the first input, from which `copied` are
    copied: frozenset[str] = frozenset()  # tensors outside the language model
    views: Views = field(default_factory=Views)
    tensors: Mapping[str, TensorMerge] = field(default_factory=dict)
    layers: tuple[tuple[int, int], ...] = ()
    mixture: Mixture | None = None  # of method `moe`; its router is read from `base`
    before: Snapshot = field(default_factory=Snapshot)  # of all inputs, taken before anything was read

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
        settings += [self.first, sorted(self.copied)] if self.copied else []
        settings += [changed] if (changed := self.views.digest()) else []
        settings += [self.tensors] if self.tensors else []
        settings += [self.mixture] if self.mixture else []
        return hashlib.sha256(repr(settings).encode()).hexdigest()

    def how(self, name: str) -> TensorMerge:
        """Return how a tensor is merged."""
        if name in self.copied:
            index = next(i for i, source in enumerate(self.sources) if source.path == self.first)
            return TensorMerge("passthrough", {}, (index,), (name,), (1.0,), None)
        if self.tensors:
            return self.tensors[name]
        count = len(self.sources)
        weights = tuple(source.weight for source in self.sources)
        base = (count, name) if self.base else None
        return TensorMerge(self.method_name, self.parameters, tuple(range(count)), (name,) * count, weights, base)

    def router_of(self, name: str) -> ComputedRouter | None:
        """Return the router that computes a tensor, if it is a gate of one."""
        is_gate = self.mixture is not None and self.mixture.origins[name].source == "computed"
        return self.mixture.router if self.mixture is not None and is_gate else None

    def added(self, part: Unit) -> np.ndarray:
        """Return a part of a tensor that a mixture adds, float64."""
        if (router := self.router_of(part.name)) is not None:
            return router.gate(part.name).reshape(-1)[part.start : part.stop].astype("<f8")
        return drawn(self.how(part.name).weights[0], self.seed, part.name, part.start, part.stop)

    def noise_key(self, name: str, i: int) -> str:
        """Return the key of the random numbers of a tensor's i-th model."""
        return f"{self.seed}/{name}/{self.everyone[self.how(name).models[i]].sample}"

    def copies(self, name: str) -> bool:
        """Whether a tensor is copied unchanged: it is not floating-point or of language, or there is only one model."""
        return not self.specs[name].is_floating_point or self.how(name).is_copy

    def _units_of(self, name: str) -> Iterator[Unit]:
        spec = self.specs[name]
        undivided = not self.how(name).method.elementwise and not self.copies(name)
        step = spec.elements if undivided else BLOCK_BYTES // spec.itemsize
        for start in range(0, spec.elements, max(step, 1)):
            yield Unit(name, start, min(start + step, spec.elements))
