"""Merge models into one: planned completely, computed in chunks, published atomically."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from btm_scale.checkpoint.formats.based import with_base
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.checkpoint.hashing import BlockHashes, combined_hash, same_models
from btm_scale.checkpoint.merge import journal
from btm_scale.checkpoint.merge.moe import Ingredients, names_of
from btm_scale.checkpoint.merge.mpi import Leader, follow, world
from btm_scale.checkpoint.merge.plan import MergePlan, Unit, make_plan, plan_means
from btm_scale.checkpoint.merge.record import Merged, MergeReport, bases_of, chosen_template, provenance
from btm_scale.checkpoint.merge.sidecars import carry_sidecars, model_card
from btm_scale.checkpoint.merge.workers import merge_in_processes, open_writer
from btm_scale.errors import CheckpointError, WorkerLost
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import (
    allocated,
    make_partial,
    partial_path,
    publish_directory,
    remove_partial,
    require_space,
)
from btm_scale.util.inside import as_private_as
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.pools import MOST, in_threads
from btm_scale.util.provenance import Provenance, is_recorded, made_before

logger = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 10  # of output, so that the working set stays in a core's cache
_SHARDS_AT_ONCE = 256  # open files; the usual limit of a process is 1,024


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
    ingredients: Ingredients | None = None,
) -> MergeReport:
    """Merge model directories into the directory `output`, which appears only when it is complete.

    `inputs` are (directory, weight). `linear` divides by the sum of the weights, so they need not sum to 1, and skips
    models of weight 0. Sums are computed in float64, in an order that depends only on the models' content: the order of
    `inputs`, `jobs`, `chunk_bytes` and sharding do not change a bit. `jobs` is the number of processes; by default a
    large merge uses one per core, unless the calling process has threads. Config, tokenizer and the other files of a
    model come from the first input with a nonzero weight that has them; `chat_template` is `base` or the path of
    another template. `base` is the model from which the inputs were trained: methods that compare with it need it, and
    it completes adapters and checkpoints without their frozen weights. `ingredients` are for the method `moe`, whose
    experts have the order of `inputs`. What is not finite in the output is counted and
    logged. Repeating the call resumes an
    interrupted merge, and changes nothing after a finished one. With `mpi` every rank of `mpirun` must make the same
    call, and each gets the report. Raises `CheckpointError` listing every problem, before anything is written.
    """
    started = time.perf_counter()
    output = Path(output)
    pairs = tuple((with_base(path, base), float(weight)) for path, weight in inputs)
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
            raise CheckpointError(
                f"{output} already exists. merge does not overwrite: choose another output, or remove it first."
            )
        if method == "moe" and ingredients is None:
            ingredients = Ingredients(names_of([path for path, _ in pairs]))
        elif method != "moe" and ingredients is not None:
            raise CheckpointError(f"'{method}' has no router. Leave the router out, or use the method moe.")
        plan = make_plan(
            pairs,
            method=method,
            parameters=parameters,
            base=base,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            seed=random_seed,
            ingredients=ingredients,
        )
        spread = leader.share_out if leader else functools.partial(merge_in_processes, jobs=jobs)
        template = chosen_template(chat_template, base, pairs)
        made_by = provenance(plan, output, pairs, dtype, template)
        work = _Work(plan, output, pairs, made_by=made_by, template=template)
        carry_out = functools.partial(_carry_out, share_out=functools.partial(spread, chunk_bytes=chunk_bytes))
        is_same = functools.partial(_would_be_same, work, carry_out)
        if exists and (before := made_before(output, made_by, CheckpointError, is_same=is_same)) is not None:
            report = work.report(Merged.of(before), time.perf_counter() - started)
            done = replace(report, already_complete=True)
            return done
        (content,) = carry_out([work])
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
    if os.path.lexists(output):
        raise CheckpointError(
            f"{output} already exists. merge does not overwrite: choose another output, or remove it first."
        )
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
    work = _Work(plan, output, tuple(inputs), with_sidecars=False)
    _carry_out([work], functools.partial(merge_in_processes, jobs=None, chunk_bytes=CHUNK_BYTES))


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
        if os.path.lexists(output):
            raise CheckpointError(
                f"{output} already exists. merge does not overwrite: choose another output, or remove it first."
            )
    plans = plan_means(list(outputs.values()), dtype=dtype, max_shard_bytes=max_shard_bytes)
    works = [_Work(plan, output, tuple(inputs)) for plan, (output, inputs) in zip(plans, outputs.items(), strict=True)]
    reports: list[MergeReport] = []
    for batch in _passes(works):
        # Each output's own check sees the same free space.
        needed = (max(0, work.bytes_written - allocated(work.partial)) for work in batch)
        require_space(batch[0].output.parent, sum(needed))
        contents = _carry_out(batch, functools.partial(merge_in_processes, jobs=None, chunk_bytes=CHUNK_BYTES))
        seconds = time.perf_counter() - started
        reports += [work.report(content, seconds) for work, content in zip(batch, contents, strict=True)]
        started = time.perf_counter()
    return reports


@dataclass(frozen=True)
class _Work:
    """One output of a merge."""

    plan: MergePlan
    output: Path
    inputs: tuple[tuple[Path, float], ...]
    with_sidecars: bool = True  # config, tokenizer and model card
    made_by: Provenance | None = None  # without the answer
    template: str | None = None  # the chat template, if not that of an input

    @property
    def partial(self) -> Path:
        """The temporary directory in which the output is written."""
        return partial_path(self.output)

    @property
    def bytes_written(self) -> int:
        """Bytes of weights."""
        return sum(spec.nbytes for spec in self.plan.specs.values())

    def report(self, merged: Merged, seconds: float) -> MergeReport:
        """Return the report of this output."""
        return MergeReport(
            output=self.output,
            method=self.plan.method_name,
            inputs=self.inputs,
            tensors=len(self.plan.specs),
            parameters=sum(spec.elements for spec in self.plan.specs.values()),
            bytes_read=self.plan.bytes_read,
            bytes_written=self.bytes_written,
            content_hash=merged.content_hash,
            seconds=seconds,
            nonfinite=merged.nonfinite,
            weights={
                str(source.path): str(read) for source in self.plan.everyone if (read := weight_sets(source.path))
            },
        )


def _passes(works: Sequence[_Work]) -> Iterator[Sequence[_Work]]:
    """Yield batches of outputs to write together: at least one, and at most `_SHARDS_AT_ONCE` open files."""
    batch: list[_Work] = []
    files = 0.0
    for work in works:
        shards = 1 + work.bytes_written // work.plan.max_shard_bytes
        if batch and files + shards > _SHARDS_AT_ONCE:
            yield batch
            batch, files = [], 0.0
        batch.append(work)
        files += shards
    if batch:
        yield batch


def _carry_out(works: Sequence[_Work], share_out: Callable[..., None]) -> list[Merged]:
    """Allocate the shards, merge all units, publish; return what is known of each output.

    An error removes the partial outputs. After the kill of a worker they are kept, and the same merge resumes there.
    """
    with ExitStack() as stack:
        for work in works:
            stack.enter_context(journal.only_merge_into(work.partial))
        try:
            # Mostly I/O bound, so several outputs run at a time.
            with writing(works[0].output):
                in_threads(_allocate, works, at_once=MOST)
                share_out([(work.plan, work.partial) for work in works])
                return in_threads(_publish, works, at_once=MOST)
        except WorkerLost:
            raise
        except Exception:
            for work in works:
                remove_partial(work.partial)
            raise


def _would_be_same(work: _Work, carry_out: Callable[..., list[Merged]]) -> bool:
    """Merge again, beside the output, and return whether that gives the files that the output has."""
    logger.info("Inputs of %s have new modification times: merging them again, to compare.", work.output)
    with scratch_directory(work.output) as folder:
        again = replace(work, output=folder / work.output.name, made_by=None)
        carry_out([again])
        return same_models(again.output, work.output)


def _allocate(work: _Work) -> None:
    """Create the output's shards at full size, unless an interrupted merge left them and they are intact."""
    fingerprint = work.plan.fingerprint()
    if not (journal.can_resume(work.partial, fingerprint) and _is_intact(work)):
        make_partial(work.partial)
        writer = open_writer(work.plan, work.partial, attach=False)
        # The journal implies that the headers are on disk; a resumed merge does not write them again.
        writer.sync()
        writer.detach()
        journal.begin(work.partial, fingerprint)


def _is_intact(work: _Work) -> bool:
    """Whether the bytes of every finished unit have the hashes that were noted when they were written."""
    specs = work.plan.specs
    done = journal.finished(work.partial)
    if any(unit.name not in specs or unit.stop > specs[unit.name].elements for unit in done):
        return False
    try:
        writer = open_writer(work.plan, work.partial, attach=True)
    except OSError:
        return False

    def has_its_hashes(unit: Unit) -> bool:
        hashes = BlockHashes()
        for piece in writer.pieces(unit.name, unit.start, unit.stop):
            hashes.update(piece)
        return hashes.finished() == done[unit]

    try:
        return writer.has_its_headers() and all(in_threads(has_its_hashes, list(done), at_once=MOST))
    finally:
        writer.detach()


def _publish(work: _Work) -> Merged:
    """Add the sidecars and publish a merged model."""
    nonfinite = journal.nonfinite(work.partial)
    content = _complete(work.plan, work.partial)
    if work.with_sidecars:
        _add_sidecars(work, content)
    if work.made_by is not None:
        answer = {"content_hash": content, **({"nonfinite": asdict(nonfinite)} if nonfinite else {})}
        work.made_by.model_copy(update={"answer": answer}).write_into(work.partial)
    as_private_as([*(source.path for source in work.plan.everyone), *bases_of(work.plan)], work.partial)
    publish_directory(work.partial, work.output)
    if nonfinite:
        dtypes = {spec.dtype for spec in work.plan.specs.values() if spec.dtype.is_floating_point}
        logger.warning("%s", nonfinite.message(work.output, dtypes.pop() if len(dtypes) == 1 else None))
    return Merged(content, nonfinite)


def _add_sidecars(work: _Work, content: str) -> None:
    # A model of weight 0 was neither read nor compared; its config may be of a different family.
    read = {source.path for source in work.plan.sources}
    used = [path for path, _ in work.inputs if path in read]
    carry_sidecars(used, work.partial, work.plan.specs, template=work.template)
    if (mixture := work.plan.mixture) is not None:
        (work.partial / "config.json").write_text(json.dumps(mixture.config(work.plan.specs), indent=2) + "\n")
    (work.partial / "README.md").write_text(model_card(work.plan, work.inputs, content), encoding="utf-8")


def _complete(plan: MergePlan, partial: Path) -> str:
    """Give the shards their final names; return the content hash."""
    done = journal.finished(partial)
    blocks: dict[str, list[str]] = {name: [] for name in plan.specs}
    writer = open_writer(plan, partial, attach=True)
    for unit in plan.units:
        blocks[unit.name] += done[unit]
        writer.mark_written(unit.name, unit.start, unit.stop)
    for name, spec in plan.specs.items():
        if spec.elements == 0:
            writer.mark_written(name)
    # The journal is removed first: a kill in between loses work, but never leaves a journal of renamed shards.
    journal.clear(partial)
    writer.close()
    return combined_hash(plan.specs, blocks)
