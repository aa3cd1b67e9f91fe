"""The arithmetic of a merge, unit by unit: in threads, in processes of one host, or in MPI ranks."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import local

import torch

from btm_scale.checkpoint import journal
from btm_scale.checkpoint.formats import open_model
from btm_scale.checkpoint.hashing import BlockHashes
from btm_scale.checkpoint.noise import uniform
from btm_scale.checkpoint.plan import MergePlan, Unit
from btm_scale.checkpoint.registry import Piece, Whole
from btm_scale.checkpoint.sharded_writer import ShardedWriter
from btm_scale.checkpoint.tensors import ModelReader
from btm_scale.process import end_with_parent

# Bytes of output between two notes of what is done. Each waits for the disk while the threads go on, so that little
# is left to wait for at the end.
_NOTE_EVERY = 128 << 20
_ROWS_ELEMENTS = 1 << 15  # in a piece of whole rows; torch sums so many in one order whatever the threads
_MOST_THREADS = 8


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Whole units run side by side, so each stays on one core; sums then have one order on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_writer(plan: MergePlan, partial: Path, *, attach: bool) -> ShardedWriter:
    """The output's shards in `partial`, laid out anew or found there."""
    return ShardedWriter(partial, plan.specs, max_shard_bytes=plan.max_shard_bytes, attach=attach)


def merge_share(
    plan: MergePlan, partial: Path, rank: int, size: int, *, chunk_bytes: int, by_shard: bool = False
) -> None:
    """Do one of `size` shares of the units that are not done, and note them.

    `by_shard` gives every output file to one rank: on NFS two hosts must not write the same page of a file.
    """
    done = journal.finished(partial)
    writer = open_writer(plan, partial, attach=True)
    with ExitStack() as stack:
        stack.callback(writer.detach)
        stack.enter_context(_one_torch_thread())
        readers = [stack.enter_context(open_model(source.path)) for source in plan.sources]
        base = stack.enter_context(open_model(plan.base.path)) if plan.base else None
        mine = [
            unit
            for i, unit in enumerate(plan.units)
            if unit not in done and (writer.shard_of(unit.name) if by_shard else i) % size == rank
        ]
        run = _UnitRunner(plan, readers, base, writer, chunk_bytes)
        cores = max(1, len(os.sched_getaffinity(0)) // (1 if by_shard else size))
        threads = min(cores, _MOST_THREADS)
        _run_all(mine, run, threads, writer, lambda noted: journal.record(partial, rank, noted))


def merge_in_processes(plan: MergePlan, partial: Path, jobs: int | None, *, chunk_bytes: int) -> None:
    """All shares on this host, in this process and `jobs` - 1 others."""
    # Threads wait for one another between the short steps of a piece, so processes are twice as fast. One that is
    # forked begins at once, but where threads run they may hold locks that no one would ever open in it.
    alone = threading.active_count() == 1
    if jobs is None:
        jobs = min(len(os.sched_getaffinity(0)), _MOST_THREADS) if alone and plan.is_large else 1
    share = functools.partial(merge_share, plan, partial, size=jobs, chunk_bytes=chunk_bytes)
    if jobs == 1:
        return share(0)
    context = get_context("fork" if alone else "spawn")
    with ProcessPoolExecutor(jobs - 1, mp_context=context, initializer=end_with_parent) as pool:
        others = [pool.submit(share, rank) for rank in range(1, jobs)]
        share(0)
        for other in others:
            other.result()
    return None


class _UnitRunner:
    """Merges, writes and hashes one unit; safe to call from several threads."""

    def __init__(
        self,
        plan: MergePlan,
        readers: Sequence[ModelReader],
        base: ModelReader | None,
        writer: ShardedWriter,
        chunk_bytes: int,
    ) -> None:
        self.plan, self.readers, self.base, self.writer = plan, readers, base, writer
        self.chunk_bytes = chunk_bytes
        self._local = local()

    def __call__(self, unit: Unit) -> tuple[Unit, list[str]]:
        hashes, position = BlockHashes(), unit.start
        dtype = self.plan.specs[unit.name].dtype
        for merged in self._merged(unit):
            rounded = self._buffer("output", merged.numel(), dtype).copy_(merged.reshape(-1))
            self.writer.write_range(unit.name, position, rounded)
            hashes.update(rounded)
            position += rounded.numel()
        return unit, hashes.finished()

    def _merged(self, unit: Unit) -> Iterator[torch.Tensor]:
        """The unit's pieces in their order, each of which is valid until the next is taken."""
        plan, spec = self.plan, self.plan.specs[unit.name]
        step = max(1, self.chunk_bytes // spec.dtype.itemsize)
        parts = [Unit(unit.name, i, min(i + step, unit.stop)) for i in range(unit.start, unit.stop, step)]
        if plan.copies(unit.name):
            yield from (self._read(self.readers[0], part) for part in parts)
        elif plan.method.elementwise:
            merge = functools.partial(plan.method.function, **plan.parameters)
            yield from (merge(self._piece(part)) for part in parts)
        else:
            whole = Whole(spec.shape, lambda: self._pieces_of_rows(unit.name, spec.shape))
            yield from map(plan.method.prepare(whole, plan.parameters), whole)

    def _pieces_of_rows(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
        """A tensor in pieces of whole rows, which depend on its shape alone; a vector is one."""
        row = math.prod(shape[1:])
        rows = max(1, _ROWS_ELEMENTS // max(row, 1)) if len(shape) > 1 else max(shape, default=1)
        for first in range(0, shape[0] if shape else 1, rows):
            taken = min(rows, shape[0] - first) if shape else 1
            yield self._piece(
                Unit(name, first * row, (first + taken) * row), (taken, *shape[1:]) if shape else ()
            )

    def _piece(self, part: Unit, shape: tuple[int, ...] | None = None) -> Piece:
        """Flat, or in a shape."""
        plan = self.plan

        def shaped(flat: torch.Tensor) -> torch.Tensor:
            return flat if shape is None else flat.reshape(shape)

        def noise(i: int) -> torch.Tensor:
            key = f"{plan.seed}/{part.name}/{plan.sources[i].sample}"
            return shaped(uniform(key, part.start, part.stop))

        return Piece(
            tensors=(shaped(self._widened(reader, part, "input")) for reader in self.readers),
            weights=[source.weight for source in plan.sources],
            zeros=shaped(self._buffer("result", part.stop - part.start, torch.float64).zero_()),
            base=shaped(self._widened(self.base, part, "base")) if self.base else None,
            noise=noise,
        )

    def _widened(self, reader: ModelReader, part: Unit, purpose: str) -> torch.Tensor:
        """A part in float64; converted apart from the arithmetic, which on mixed types is slower than both."""
        stored = self._read(reader, part)
        return self._buffer(purpose, stored.numel(), torch.float64).copy_(stored)

    def _read(self, reader: ModelReader, part: Unit) -> torch.Tensor:
        out = self._buffer("stored", part.stop - part.start, reader.spec(part.name).dtype)
        reader.read_into(part.name, part.start, out)
        return out

    def _buffer(self, purpose: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """This thread's array for a purpose, reused: fresh memory for every piece costs more than sums."""
        arrays: dict[tuple[str, torch.dtype], torch.Tensor] = self._local.__dict__.setdefault("arrays", {})
        array = arrays.get((purpose, dtype))
        if array is None or array.numel() < elements:
            arrays[purpose, dtype] = array = torch.empty(elements, dtype=dtype)
        return array if array.numel() == elements else array[:elements]


def _run_all(
    units: Sequence[Unit],
    run: _UnitRunner,
    threads: int,
    writer: ShardedWriter,
    note: Callable[[Sequence[tuple[Unit, list[str]]]], None],
) -> None:
    """Run units in threads; what is noted as done was synced before. The first error stops the rest."""
    done: list[tuple[Unit, list[str]]] = []
    unsynced = 0
    with ThreadPoolExecutor(threads) as pool:
        waiting: set[Future[tuple[Unit, list[str]]]] = {pool.submit(run, unit) for unit in units}
        try:
            while waiting:
                ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                failed = [future for future in ready if future.exception()]
                for unit, hashes in (future.result() for future in ready if not future.exception()):
                    done.append((unit, hashes))
                    unsynced += (unit.stop - unit.start) * writer.specs[unit.name].dtype.itemsize
                if unsynced >= _NOTE_EVERY or failed or not waiting:
                    writer.sync()
                    note(done)
                    done, unsynced = [], 0
                for future in failed:
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)
