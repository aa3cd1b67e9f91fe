"""The outputs of a merge: their shards are allocated, filled, completed with sidecars, and published."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from btm_scale.checkpoint.formats.rounded import ALL_FINITE, NonFinite
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.checkpoint.hashing import BlockHashes, combined_hash
from btm_scale.checkpoint.merge import journal, recipe
from btm_scale.checkpoint.merge.plan import MergePlan, Unit
from btm_scale.checkpoint.merge.record import Merged, bases_of
from btm_scale.checkpoint.merge.sidecars import carry_sidecars, model_card, set_template, stack_layers
from btm_scale.checkpoint.merge.vocabulary import write_tokenizer
from btm_scale.checkpoint.merge.workers import open_writer
from btm_scale.errors import CheckpointError, WorkerLost
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_partial, partial_path, publish_directory, remove_partial
from btm_scale.util.inside import as_private_as
from btm_scale.util.leftovers import scratch_directory
from btm_scale.util.pools import MOST, in_threads
from btm_scale.util.provenance import Provenance, same_files

logger = logging.getLogger(__name__)

_SHARDS_AT_ONCE = 256  # open files; the usual limit of a process is 1,024


@dataclass(frozen=True)
class MergeReport:
    """Summary of a completed merge."""

    output: Path
    method: str
    inputs: tuple[tuple[Path, float], ...]
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    content_hash: str
    seconds: float
    nonfinite: NonFinite = ALL_FINITE  # elements of the output
    weights: Mapping[str, str] = field(default_factory=dict)  # by input, the set of files that was read
    already_complete: bool = False  # an earlier call had written the output, so nothing was written


@dataclass(frozen=True)
class Work:
    """One output of a merge."""

    plan: MergePlan
    output: Path
    inputs: tuple[tuple[Path, float], ...]
    with_sidecars: bool = True  # config, tokenizer and model card
    made_by: Provenance | None = None  # without the answer
    template: str | None = None  # the chat template, if not that of an input
    recipe: str | None = None  # its YAML

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


def passes(works: Sequence[Work]) -> Iterator[Sequence[Work]]:
    """Yield batches of outputs to write together: at least one, and at most `_SHARDS_AT_ONCE` open files."""
    batch: list[Work] = []
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


def carry_out(works: Sequence[Work], share_out: Callable[..., None]) -> list[Merged]:
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


def would_be_same(work: Work, share_out: Callable[..., None]) -> bool:
    """Merge again, beside the output, and return whether that gives the files that the output has."""
    logger.info("Inputs of %s have new modification times: merging them again, to compare.", work.output)
    with scratch_directory(work.output) as folder:
        again = replace(work, output=folder / work.output.name, made_by=None)
        carry_out([again], share_out)
        return same_files(again.output, work.output)


def _allocate(work: Work) -> None:
    """Create the output's shards at full size, unless an interrupted merge left them and they are intact."""
    fingerprint = work.plan.fingerprint()
    if not (journal.can_resume(work.partial, fingerprint) and _is_intact(work)):
        make_partial(work.partial)
        writer = open_writer(work.plan, work.partial, attach=False)
        # The journal implies that the headers are on disk; a resumed merge does not write them again.
        writer.sync()
        writer.detach()
        journal.begin(work.partial, fingerprint)


def _is_intact(work: Work) -> bool:
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


def _publish(work: Work) -> Merged:
    """Add the sidecars and publish a merged model."""
    nonfinite = journal.nonfinite(work.partial)
    content = _complete(work.plan, work.partial)
    if work.with_sidecars:
        _add_sidecars(work, content)
    if work.made_by is not None:
        answer = {"content_hash": content, **({"nonfinite": asdict(nonfinite)} if nonfinite else {})}
        work.made_by.model_copy(update={"answer": answer}).write_into(work.partial)
    as_private_as([*(source.path for source in work.plan.everyone), *bases_of(work.plan)], work.partial)
    work.plan.before.require_unchanged("merge", CheckpointError)
    publish_directory(work.partial, work.output)
    if nonfinite:
        dtypes = {spec.dtype for spec in work.plan.specs.values() if spec.is_floating_point}
        logger.warning("%s", nonfinite.message(work.output, dtypes.pop() if len(dtypes) == 1 else None))
    return Merged(content, nonfinite)


def _add_sidecars(work: Work, content: str) -> None:
    # A model of weight 0 was neither read nor compared; its config may be of a different family.
    read = {source.path for source in work.plan.sources}
    used = [path for path, _ in work.inputs if path in read]
    carry_sidecars(used, work.partial, work.plan.specs, template=work.template)
    if (mixture := work.plan.mixture) is not None:
        (work.partial / "config.json").write_text(json.dumps(mixture.config(work.plan.specs), indent=2) + "\n")
    if work.plan.views.rows is not None:
        write_tokenizer(work.plan.views.rows, used[0], work.partial)
        if work.template is not None:
            set_template(work.partial, work.template)
    if work.plan.layers:
        stack_layers(work.partial, [(work.plan.sources[i].path, number) for i, number in work.plan.layers])
    if work.recipe is not None:
        (work.partial / recipe.NAME).write_text(work.recipe, encoding="utf-8")
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
