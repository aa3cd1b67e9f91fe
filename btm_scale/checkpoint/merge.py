"""Merge models into one: planned whole, done in chunks, published at once."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint import journal
from btm_scale.checkpoint.hashing import combined_hash
from btm_scale.checkpoint.mpi import Leader, follow, world
from btm_scale.checkpoint.plan import MergePlan, make_plan
from btm_scale.checkpoint.publish import partial_path, publish_directory, write_file
from btm_scale.checkpoint.sidecars import carry_sidecars, model_card
from btm_scale.checkpoint.workers import merge_in_processes, open_writer
from btm_scale.errors import CheckpointError

CHUNK_BYTES = 256 << 10  # of output: what is at work then stays in a core's cache


@dataclass(frozen=True)
class MergeReport:
    """What a merge made."""

    output: Path
    method: str
    inputs: tuple[tuple[Path, float], ...]
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    content_hash: str
    seconds: float


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
    seed: int = 0,
    mpi: bool = False,
) -> MergeReport:
    """Merge model directories into the directory `output`, which appears only when it is whole.

    `inputs` are (directory, weight); `linear` divides by the weights' sum, so they need not sum to one, and
    it leaves out models of weight 0. Sums are in float64, in an order that depends on the models' content:
    neither the order of `inputs` nor `jobs`, `chunk_bytes` or the inputs' sharding changes a bit. `jobs` is of
    processes; by default a process without threads takes as many as there are cores for a large merge. Configs
    and tokenizer come from the first input. An interrupted merge goes on where it was when it is asked for again.
    With `mpi` every rank of `mpirun` must make the same call, and each gets the report. Raises
    `CheckpointError` with every problem, before any write.
    """
    started = time.perf_counter()
    output = Path(output)
    given = tuple((Path(path), float(weight)) for path, weight in inputs)
    ranks = world() if mpi else None
    if ranks is not None and ranks.rank > 0:
        report: MergeReport = follow(ranks)
        return report
    leader = Leader(ranks) if ranks is not None else None
    done: MergeReport | None = None
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CheckpointError(f"{output} exists already. Choose another output, or remove it first.")
        plan = make_plan(
            given,
            method=method,
            parameters=parameters,
            base=base,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            seed=seed,
        )
        spread = leader.share_out if leader else functools.partial(merge_in_processes, jobs=jobs)
        content = _carry_out(plan, output, given, functools.partial(spread, plan, chunk_bytes=chunk_bytes))
        done = MergeReport(
            output=output,
            method=method,
            inputs=given,
            tensors=len(plan.specs),
            parameters=sum(spec.elements for spec in plan.specs.values()),
            bytes_read=plan.bytes_read,
            bytes_written=sum(spec.nbytes for spec in plan.specs.values()),
            content_hash=content,
            seconds=time.perf_counter() - started,
        )
        return done
    finally:
        if leader:
            leader.finish(done)


def _carry_out(
    plan: MergePlan,
    output: Path,
    inputs: Sequence[tuple[Path, float]],
    share_out: Callable[..., None],
) -> str:
    """Lay out, do the units, publish; returns the content hash. Nothing is left behind by an error."""
    partial = partial_path(output)
    with journal.only_merge_into(partial):
        _lay_out(plan, partial)
        try:
            share_out(partial=partial)
            content = _complete(plan, partial)
            dtypes = {spec.dtype for spec in plan.specs.values() if spec.dtype.is_floating_point}
            carry_sidecars(inputs[0][0], partial, dtypes.pop() if len(dtypes) == 1 else None)
            write_file(partial / "README.md", model_card(plan, inputs, content))
            publish_directory(partial, output)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return content


def _lay_out(plan: MergePlan, partial: Path) -> None:
    """Make the output's shards at their full size, unless an interrupted merge left them."""
    fingerprint = plan.fingerprint()
    if not journal.can_resume(partial, fingerprint):
        open_writer(plan, partial, attach=False).detach()
        journal.begin(partial, fingerprint)


def _complete(plan: MergePlan, partial: Path) -> str:
    """Give the shards their names; returns the content hash."""
    done = journal.finished(partial)
    blocks: dict[str, list[str]] = {name: [] for name in plan.specs}
    writer = open_writer(plan, partial, attach=True)
    for unit in plan.units:
        blocks[unit.name] += done[unit]
        writer.mark_written(unit.name, unit.start, unit.stop)
    for name, spec in plan.specs.items():
        if spec.elements == 0:
            writer.mark_written(name)
    writer.close()
    journal.clear(partial)
    return combined_hash(plan.specs, blocks)
