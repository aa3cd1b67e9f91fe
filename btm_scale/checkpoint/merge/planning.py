"""Plan a merge: every problem is reported before the first byte is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from btm_scale.checkpoint.completeness import problems_of
from btm_scale.checkpoint.formats.based import base_of, is_completed
from btm_scale.checkpoint.formats.kept_hashes import NAME as HASHES
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec, parse_code
from btm_scale.checkpoint.hashing import sample_hash
from btm_scale.checkpoint.merge.compatibility import common_specs
from btm_scale.checkpoint.merge.heads import SETTING, head_problem, shared_heads
from btm_scale.checkpoint.merge.moe import RANDOM_LIMIT, Ingredients, Origin, mixture_of
from btm_scale.checkpoint.merge.names import missing_prefixes, older_names
from btm_scale.checkpoint.merge.parameters import parameter_problems, weight_problems
from btm_scale.checkpoint.merge.plan import MergePlan, Source, TensorMerge
from btm_scale.checkpoint.merge.registry import METHODS, Method, find_method
from btm_scale.checkpoint.merge.settings import LAYER_KEYS, config_problems, is_allowed
from btm_scale.checkpoint.merge.tokenizers import tokenizer_problems
from btm_scale.checkpoint.merge.towers import other_towers
from btm_scale.checkpoint.merge.views import Views
from btm_scale.checkpoint.merge.vocabulary import token_rows
from btm_scale.errors import CheckpointError
from btm_scale.util.snapshot import Snapshot

# Settings with a value per layer, which an output of stacked layers gets from the layers' models.
_PER_LAYER = (*LAYER_KEYS, "layer_types")
Stacked = Callable[[Sequence[ModelReader]], tuple[dict[str, TensorSpec], list[str]]]
"""Returns the output's specs, and problems, of a merge whose models may have different numbers of layers."""


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
    tokenizer: str | Path | None = None,
    new_rows: str = "mean",
    allow: Sequence[str] = (),
    ingredients: Ingredients | None = None,
) -> MergePlan:
    """Check a merge and return its plan. Raises one `CheckpointError` that lists every problem.

    With `tensors` only these are merged, and the models' configs and tokenizers are not compared. `tokenizer` and
    `new_rows` are those of `merge`; `allow` names settings that may differ; `ingredients` are for the method `moe`.
    """
    chosen = find_method(method)
    used = _used_inputs(chosen, inputs)
    problems = weight_problems(chosen, used) + parameter_problems(chosen, parameters or {})
    if chosen.needs_base and base is None:
        problems.append(
            f"'{method}' needs a base: the model from which all inputs were trained. Give it (--base DIR; `base` in "
            "Python)."
        )
    if base is not None and not chosen.takes_base and not any(map(is_completed, (path for path, _ in used))):
        others = ", ".join(name for name, other in sorted(METHODS.items()) if other.takes_base)
        problems.append(f"'{method}' takes no base. Leave {base} out, or use a method that takes one: {others}.")
    if ingredients is not None and tokenizer is not None:
        problems.append("'moe' keeps the tokenizer of its models. Leave --tokenizer out, and merge vocabularies first.")
    basis = [Path(base)] if base is not None and chosen.takes_base else []
    besides = ingredients.others if ingredients is not None else []
    paths = [*(path for path, _ in used), *basis, *besides]
    choice = Vocabulary(tokenizer, new_rows, basis[0] if basis else None) if tokenizer is not None else None
    models = checked_models(
        paths, parse_code(dtype) if dtype else None, problems, tensors=tensors, allow=allow, choice=choice
    )
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
    problems = [problem for used in per_output for problem in weight_problems(linear, used)]
    paths = list(dict.fromkeys(path for used in per_output for path, _ in used))
    models = checked_models(paths, parse_code(dtype) if dtype else None, problems)
    return [models.plan(used, None, "linear", {}, max_shard_bytes, 0) for used in per_output]


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary that was asked for."""

    tokenizer: str | Path
    new_rows: str
    base: Path | None


@dataclass(frozen=True)
class Models:
    """Facts about compatible models that any plan of them needs."""

    specs: Mapping[str, TensorSpec]
    samples: Mapping[Path, str]
    files: Mapping[Path, str]
    bytes_read: Mapping[Path, int]
    views: Views
    before: Mapping[Path, Snapshot]

    def source(self, path: Path, weight: float) -> Source:
        """Return a model as a source."""
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
        experts, others = [path for path, _ in inputs], ingredients.others
        read = [*inputs, *((path, 0.0) for path in dict.fromkeys(others) if path not in experts)]
        plan = self.plan(read, None, "moe", parameters, max_shard_bytes, seed)
        mixture, specs = mixture_of(experts, self.specs, ingredients, parameters["top_k"])
        index = {source.path: i for i, source in enumerate(plan.sources)}
        places = [index[path] for path in [*experts, *others]]
        router = ingredients.router if isinstance(ingredients.router, Path) else None
        return replace(
            plan,
            mixture=mixture,
            specs=specs,
            base=None if router is None else Source(router, 0.0, "", _files_hash(router)),
            copied=frozenset(),
            tensors={name: _tensor_merge(name, origin, plan, places) for name, origin in mixture.origins.items()},
            before=Snapshot.joined([plan.before, Snapshot.of([router] if router else [])]),
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
        """Return the plan of one output."""
        sources = [self.source(path, weight) for path, weight in inputs]
        # Content first: all means of the same models then add them in one order, and can be computed together.
        sources.sort(key=lambda source: (source.sample, source.weight, str(source.path.resolve())))
        read = sum(self.bytes_read[source.path] for source in [*sources, *([base] if base else [])])
        first = inputs[0][0]
        copied = other_towers(first, self.specs) if len(inputs) > 1 else frozenset()
        return MergePlan(
            tuple(sources),
            base,
            method,
            parameters,
            self.specs,
            max_shard_bytes,
            seed,
            read,
            first,
            copied,
            self.views,
            before=Snapshot.joined(self.before[source.path] for source in [*sources, *([base] if base else [])]),
        )


def _tensor_merge(name: str, origin: Origin, plan: MergePlan, places: Sequence[int]) -> TensorMerge:
    """Return how a tensor of a mixture is made; `places` are the sources of its inputs."""
    count = len(plan.sources)
    if origin.source == "computed":
        return TensorMerge(plan.method_name, {}, (), (name,), (), None)
    if origin.source == "random" or origin.source == "zeros":
        limit = RANDOM_LIMIT if origin.source == "random" else 0.0
        return TensorMerge(plan.method_name, {}, (), (name,), (limit,), None)
    if origin.source == "mean":
        weights = {i: source.weight for i, source in enumerate(plan.sources) if source.weight}
        return TensorMerge("linear", {}, tuple(weights), (origin.tensor,) * len(weights), tuple(weights.values()), None)
    index = count if origin.source == "router" else places[origin.source]
    scale = {} if origin.scale == 1 else {"scale": origin.scale}
    return TensorMerge("passthrough", scale, (index,), (origin.tensor,), (1.0,), None)


def _used_inputs(method: Method, inputs: Sequence[tuple[Path, float]]) -> list[tuple[Path, float]]:
    return [(path, float(weight)) for path, weight in inputs if weight or method.name != "linear"]


def checked_models(
    paths: Sequence[Path],
    code: str | None,
    problems: list[str],
    *,
    tensors: Sequence[str] | None = None,
    stacked: Stacked | None = None,
    allow: Sequence[str] = (),
    choice: Vocabulary | None = None,
) -> Models:
    """Open and compare all models. Raises one `CheckpointError` that lists `problems` and any found here."""
    problems = list(problems)
    before = {path: _snapshot(path) for path in paths}
    with ExitStack() as stack:
        opened: dict[Path, ModelReader] = {}
        for path in dict.fromkeys(paths):
            try:
                opened[path] = stack.enter_context(open_model(path))
            except CheckpointError as error:
                problems.append(str(error))
        complete = opened if len(opened) == len(set(paths)) else {}
        views = Views(renamed=older_names(complete))
        views = replace(views, prefixes=missing_prefixes(views.of(complete)))
        views = replace(views, heads=shared_heads(views.of(complete)) if tensors is None else {})
        named = views.of(complete)
        specs: dict[str, TensorSpec] = {}
        if named:
            # The configs' sizes come first: they explain most differences between tensors.
            if choice is not None:
                try:
                    rows = token_rows(choice.tokenizer, choice.new_rows, named, choice.base)
                    views = replace(views, rows=rows)
                except CheckpointError as error:
                    problems.append(str(error))
            if tensors is None:
                if views.heads and not is_allowed(SETTING, allow):
                    problems.append(head_problem(views.heads, named))
                adapted = [*(["vocab_size"] if choice is not None else []), *(_PER_LAYER if stacked else [])]
                adapted += [SETTING] if views.heads else []
                problems += config_problems(paths, [*allow, *adapted])
                problems += tokenizer_problems(paths, allow) if choice is None else []
                problems += [problem for model in complete.values() for problem in problems_of(model)]
            seen = views.of(complete)
            readers = [seen[path] for path in paths]
            specs, differences = stacked(readers) if stacked else common_specs(readers, code, tensors)
            problems += differences
        if problems:
            listing = "\n".join(f"  - {problem}" for problem in problems)
            raise CheckpointError(f"Cannot merge these models. Nothing was written:\n{listing}")
        return Models(
            specs,
            {path: sample_hash(reader) for path, reader in named.items()},
            {path: _files_hash(path) for path in named},
            {
                path: reader.nbytes_as(None) if stacked else sum(reader.spec(name).nbytes for name in specs)
                for path, reader in named.items()
            },
            views,
            before,
        )


def _bases(path: Path) -> list[Path]:
    base = base_of(path) if is_completed(path) else None
    return [] if base is None else [base]


def _snapshot(path: Path) -> Snapshot:
    bases: list[Path] = []
    with suppress(CheckpointError):  # opening the model reports it
        bases = _bases(path)
    return Snapshot.of([path, *bases])


def _files_hash(path: Path) -> str:
    """Return a hash that changes with the name, size or modification time of any file of a model or of its base.

    Dangling links (editor locks), partial outputs inside the model's folder and kept hashes are ignored.
    """
    files = [
        (str(file), (stat := file.stat()).st_size, stat.st_mtime_ns)
        for file in sorted(path.rglob("*") if path.is_dir() else [path])
        if file.is_file() and ".partial" not in str(file.relative_to(path)) and file.name != HASHES
    ]
    completing = [_files_hash(base) for base in _bases(path)]
    return hashlib.sha256(repr([*files, *completing]).encode()).hexdigest()
