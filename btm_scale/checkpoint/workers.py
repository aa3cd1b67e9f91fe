"""The arithmetic of a merge, unit by unit: in threads, in processes of one host, or in MPI ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import local

import torch

from btm_scale.checkpoint import journal
from btm_scale.checkpoint.formats import open_model
from btm_scale.checkpoint.hashing import BLOCK_BYTES, block_hash
from btm_scale.checkpoint.noise import uniform
from btm_scale.checkpoint.plan import MergePlan, Unit
from btm_scale.checkpoint.registry import Piece
from btm_scale.checkpoint.sharded_writer import ShardedWriter
from btm_scale.checkpoint.tensors import ModelReader

_NOTE_EVERY = 1 << 30  # bytes of output between two notes of what is done
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
        threads = min(cores, _MOST_THREADS) if plan.method.elementwise else 1
        _run_all(mine, run, threads, writer, lambda noted: journal.record(partial, rank, noted))


def merge_in_processes(plan: MergePlan, partial: Path, jobs: int, *, chunk_bytes: int) -> None:
    """All shares on this host, in `jobs` processes."""
    if jobs == 1:
        return merge_share(plan, partial, 0, 1, chunk_bytes=chunk_bytes)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        shares = [
            pool.submit(merge_share, plan, partial, rank, jobs, chunk_bytes=chunk_bytes)
            for rank in range(jobs)
        ]
        for share in shares:
            share.result()
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
        spec = self.plan.specs[unit.name]
        if self.plan.method.elementwise or self.plan.copies(unit.name):
            return unit, [block_hash(self._streamed(unit))]
        merged = self._merged(unit, spec.shape)
        self.writer.write(unit.name, merged)
        blocks = merged.reshape(-1).split(BLOCK_BYTES // spec.dtype.itemsize)
        return unit, [block_hash([block]) for block in blocks]

    def _streamed(self, unit: Unit) -> Iterator[torch.Tensor]:
        """The unit's chunks, each after it was written."""
        dtype = self.plan.specs[unit.name].dtype
        step = max(1, self.chunk_bytes // dtype.itemsize)
        for start in range(unit.start, unit.stop, step):
            part = Unit(unit.name, start, min(start + step, unit.stop))
            if self.plan.copies(unit.name):
                chunk = self._read(self.readers[0], part).to(dtype)
            else:
                chunk = self._merged(part, (-1,))
            self.writer.write_range(unit.name, start, chunk)
            yield chunk

    def _merged(self, part: Unit, shape: tuple[int, ...]) -> torch.Tensor:
        plan = self.plan
        compute = plan.compute_dtype(part.name)

        def noise(i: int) -> torch.Tensor:
            key = f"{plan.seed}/{part.name}/{plan.sources[i].sample}"
            return uniform(key, part.start, part.stop).reshape(shape)

        piece = Piece(
            tensors=(self._read(reader, part).reshape(shape) for reader in self.readers),
            weights=[source.weight for source in plan.sources],
            zeros=self._buffer("result", part, compute).zero_().reshape(shape),
            base=self._read(self.base, part, "base").to(compute).reshape(shape) if self.base else None,
            noise=noise,
        )
        return plan.method(piece, **plan.parameters).to(plan.specs[part.name].dtype)

    def _read(self, reader: ModelReader, part: Unit, purpose: str = "input") -> torch.Tensor:
        out = self._buffer(purpose, part, reader.spec(part.name).dtype)
        reader.read_into(part.name, part.start, out)
        return out

    def _buffer(self, purpose: str, part: Unit, dtype: torch.dtype) -> torch.Tensor:
        """This thread's array for a purpose, reused: fresh memory for every chunk costs more than sums."""
        arrays: dict[str, torch.Tensor] = self._local.__dict__
        elements = part.stop - part.start
        key = f"{purpose} {dtype}"
        array = arrays.get(key)
        if array is None or array.numel() < elements:
            arrays[key] = array = torch.empty(elements, dtype=dtype)
        return array[:elements]


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
