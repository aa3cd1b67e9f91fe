"""Merge models into one: planned completely, computed in chunks, published atomically."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from btm_scale.checkpoint.merge.moe import Ingredients
from btm_scale.checkpoint.merge.mpi import Leader, follow, world
from btm_scale.checkpoint.merge.output import MergeReport, Work, carry_out, passes, would_be_same
from btm_scale.checkpoint.merge.planned import Planned, by_arguments, by_recipe
from btm_scale.checkpoint.merge.planning import make_plan, plan_means
from btm_scale.checkpoint.merge.record import Merged
from btm_scale.checkpoint.merge.workers import merge_in_processes
from btm_scale.errors import CheckpointError
from btm_scale.util.files import allocated, require_space
from btm_scale.util.provenance import is_recorded, made_before

CHUNK_BYTES = 256 << 10  # of output, so that the working set stays in a core's cache
_EXISTS = "{} already exists. merge does not overwrite: choose another output, or remove it first."


def merge(
    output: Path,
    inputs: Sequence[tuple[Path, float]],
    *,
    method: str = "linear",
    parameters: Mapping[str, float] | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    jobs: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    max_shard_bytes: float = 5e9,
    random_seed: int = 0,
    mpi: bool = False,
    chat_template: str | Path | None = None,
    tokenizer: str | Path | None = None,
    new_rows: str = "mean",
    allow: Sequence[str] = (),
    with_recipe: bool = True,
    ingredients: Ingredients | None = None,
) -> MergeReport:
    """Merge model directories into the directory `output`, which appears only when it is complete.

    `inputs` are (directory, weight), or names of models in the Hugging Face cache. `linear` divides by the sum of the
    weights, so they need not sum to 1, and skips models of weight 0. Sums are computed in float64, in an order that
    depends only on the models' content: the order of `inputs`, `jobs`, `chunk_bytes` and sharding do not change a bit.
    `jobs` is the number of processes; by default a large merge uses one per core, unless the calling process has
    threads. Config, tokenizer and the other files of a model come from the first input with a nonzero weight that has
    them; `chat_template` is `base` or the path of another template. `base` is the model from which the inputs were
    trained: methods that compare with it need it, and it completes adapters and checkpoints without their frozen
    weights. What is not finite in the output is counted and logged. `with_recipe` writes `merge_recipe.yaml`, from
    which `merge_by_recipe` gives the same bytes. `ingredients` are for the method `moe`, whose experts have the order
    of `inputs`, and which has no recipe. Repeating the call resumes an interrupted merge, and changes nothing after a
    finished one.

    `tokenizer` chooses the vocabulary of the output, to which the rows of all models are matched by token: `union`,
    `base`, or the path of a tokenizer. `new_rows` is what a model gets for tokens that it lacks, `mean` or `zero` (see
    `TokenRows`). `allow` names settings that may differ.

    With `mpi` every rank of `mpirun` must make the same call, and each gets the report. Raises `CheckpointError`
    listing every problem, before anything is written.
    """
    planned = functools.partial(
        by_arguments,
        inputs,
        method=method,
        parameters=parameters,
        base=base,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        random_seed=random_seed,
        chat_template=chat_template,
        tokenizer=tokenizer,
        new_rows=new_rows,
        allow=allow,
        with_recipe=with_recipe,
        ingredients=ingredients,
    )
    return _merge(Path(output), planned, jobs=jobs, chunk_bytes=chunk_bytes, mpi=mpi)


def merge_by_recipe(
    output: Path,
    file: Path,
    *,
    dtype: str | None = None,
    random_seed: int | None = None,
    max_shard_bytes: float | None = None,
    jobs: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    mpi: bool = False,
) -> MergeReport:
    """Merge by a mergekit YAML, or by the `merge_recipe.yaml` of a merge; otherwise as `merge`, which raises the same.

    `dtype`, `random_seed` and `max_shard_bytes` replace the recipe's unless they are None.
    """

    planned = functools.partial(by_recipe, file, dtype=dtype, random_seed=random_seed, max_shard_bytes=max_shard_bytes)
    return _merge(Path(output), planned, jobs=jobs, chunk_bytes=chunk_bytes, mpi=mpi)


def _merge(
    output: Path, planned: Callable[[], Planned], *, jobs: int | None, chunk_bytes: int, mpi: bool
) -> MergeReport:
    started = time.perf_counter()
    ranks = world() if mpi else None
    if ranks is not None and ranks.rank > 0:
        report: MergeReport = follow(ranks)
        return report
    leader = Leader(ranks) if ranks is not None else None
    done: MergeReport | None = None
    try:
        # A directory cannot replace a link, not even a dangling one or one to an empty directory.
        exists = output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir())))
        if exists and not is_recorded(output):
            raise CheckpointError(_EXISTS.format(output))
        one = planned()
        spread = functools.partial(
            leader.share_out if leader else functools.partial(merge_in_processes, jobs=jobs), chunk_bytes=chunk_bytes
        )
        made_by = one.provenance(output)
        work = Work(one.plan, output, one.inputs, made_by=made_by, template=one.template, recipe=one.recipe)
        is_same = functools.partial(would_be_same, work, spread)
        if exists and (before := made_before(output, made_by, CheckpointError, is_same=is_same)) is not None:
            report = work.report(Merged.of(before), time.perf_counter() - started)
            done = replace(report, already_complete=True)
            return done
        (content,) = carry_out([work], spread)
        done = work.report(content, time.perf_counter() - started)
        return done
    finally:
        if leader:
            leader.finish(done)


def merge_tensors(
    output: Path, inputs: Sequence[tuple[Path, float]], tensors: Sequence[str], *, dtype: str | None = None
) -> None:
    """Write the weighted mean of some tensors to `output/model.safetensors`, and no other file.

    Like `merge` with method `linear`, but configs and tokenizers are neither compared nor copied: the caller checks
    that the models are compatible.
    """
    _require_new(output)
    plan = make_plan(
        inputs,
        method="linear",
        parameters=None,
        base=None,
        dtype=dtype,
        max_shard_bytes=float("inf"),
        seed=0,
        tensors=tensors,
    )
    carry_out(
        [Work(plan, output, tuple(inputs), with_sidecars=False)],
        functools.partial(merge_in_processes, jobs=None, chunk_bytes=CHUNK_BYTES),
    )


def merge_many(
    outputs: Mapping[Path, Sequence[tuple[Path, float]]], *, dtype: str | None = None, max_shard_bytes: float = 5e9
) -> list[MergeReport]:
    """Merge models into several directories by method `linear`, with the same bytes as one `merge` per output.

    `outputs` maps each directory to its (directory, weight) inputs; all models must be compatible. Every model is
    checked once, and read once per pass over as many outputs as may be open at a time. A report's seconds are those of
    its pass. Raises `CheckpointError` like `merge`; outputs published before the error are kept.
    """
    started = time.perf_counter()
    for output in outputs:
        _require_new(output)
    plans = plan_means(list(outputs.values()), dtype=dtype, max_shard_bytes=max_shard_bytes)
    works = [Work(plan, output, tuple(inputs)) for plan, (output, inputs) in zip(plans, outputs.items(), strict=True)]
    reports: list[MergeReport] = []
    for batch in passes(works):
        # Each output's own check sees the same free space.
        needed = (max(0, work.bytes_written - allocated(work.partial)) for work in batch)
        require_space(batch[0].output.parent, sum(needed))
        contents = carry_out(batch, functools.partial(merge_in_processes, jobs=None, chunk_bytes=CHUNK_BYTES))
        seconds = time.perf_counter() - started
        reports += [work.report(content, seconds) for work, content in zip(batch, contents, strict=True)]
        started = time.perf_counter()
    return reports


def _require_new(output: Path) -> None:
    if os.path.lexists(output):
        raise CheckpointError(_EXISTS.format(output))
