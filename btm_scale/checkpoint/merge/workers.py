"""Distribute merges over threads, processes of one host, or MPI ranks."""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, nullcontext
from pathlib import Path
from queue import SimpleQueue

from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.merge import journal
from btm_scale.checkpoint.merge.bar import Bar
from btm_scale.checkpoint.merge.mean_runner import MeansRunner
from btm_scale.checkpoint.merge.numpy_runner import NumpyRunner, torch_is_loaded, with_torch
from btm_scale.checkpoint.merge.plan import MergePlan, Unit
from btm_scale.checkpoint.merge.runner import Target, UnitRunner, kept_hash
from btm_scale.checkpoint.merge.shares import Shares
from btm_scale.util.cores import visible_cores
from btm_scale.util.direct_io import is_worthwhile
from btm_scale.util.one_thread import one_torch_thread
from btm_scale.util.pools import MOST, in_threads, lost_workers_told, may_fork, process_pool

# Bytes of output between two journal entries. Each fsyncs while the threads continue, so that little is left to flush
# at the end.
_NOTE_EVERY = 128 << 20
_BAR_SECONDS = 1.0
_PER_CORE = 2  # threads that write directly, of those that copy and of those that compute: one waits for the disk

Runner = UnitRunner | MeansRunner | NumpyRunner
Merged = tuple[Unit, list[list[str]]]
"""A unit, and its block hashes for each output."""

Output = tuple[MergePlan, Path]
"""A plan and the directory of its partial shards."""


def open_writer(plan: MergePlan, partial: Path, *, attach: bool) -> ShardedWriter:
    """Open a writer of the output's shards in `partial`, which exist already if `attach`."""
    # Sums by torch are not written directly: they take longer than the disk.
    direct = is_worthwhile(sum(spec.nbytes for name, spec in plan.specs.items() if plan.copies(name)))
    return ShardedWriter(partial, plan.specs, max_shard_bytes=plan.max_shard_bytes, attach=attach, direct=direct)


def merge_share(
    outputs: Sequence[Output],
    rank: int,
    size: int,
    *,
    chunk_bytes: int,
    given: Sequence[Sequence[Unit]] | None = None,
    bar: Bar | None = None,
) -> None:
    """Merge and record this rank's part, one of `size`, of the remaining units, which all outputs have in common.

    `given` has the units of each rank of this host. Without it, every output file is assigned to one rank: on NFS two
    hosts must not write the same page of a file. `bar` is updated with what all ranks recorded.
    """
    with ExitStack() as stack:
        targets = _targets(outputs, stack)
        first = targets[0]
        if given is None:
            units: Sequence[Unit] = [
                unit for unit in remaining(outputs) if first.writer.shard_of(unit.name) % size == rank
            ]
        else:
            units = given[rank]
        cores = max(1, visible_cores() // (1 if given is None else size))

        def note(finished: Sequence[Merged]) -> None:
            def note_one(i: int) -> None:
                targets[i].writer.sync()
                counted = {unit: targets[i].nonfinite.pop(unit) for unit, _ in finished if unit in targets[i].nonfinite}
                journal.record_nonfinite(outputs[i][1], rank, counted)
                journal.record(outputs[i][1], rank, [(unit, hashes[i]) for unit, hashes in finished])

            in_threads(note_one, range(len(targets)), at_once=MOST)  # I/O bound

        for run, part in _runners(targets, units, chunk_bytes, cores):
            threads = min(cores, MOST)
            if isinstance(run, NumpyRunner) and first.writer.is_direct:
                # The disk gets copies while sums and gates are computed.
                ordered = sorted(part, key=lambda unit: not first.plan.copies(unit.name))
                _run_all(ordered, run, (_PER_CORE * threads, _PER_CORE * threads), note, bar)
                continue
            with nullcontext() if isinstance(run, NumpyRunner) else one_torch_thread():
                _run_all(part, run, (threads, 0), note, bar)


def _targets(outputs: Sequence[Output], stack: ExitStack) -> list[Target]:
    """Open all models and outputs; `stack` closes them."""
    paths = {source.path for plan, _ in outputs for source in plan.everyone}
    models = outputs[0][0].views.open(sorted(paths), stack)
    targets = []
    for plan, partial in outputs:
        writer = open_writer(plan, partial, attach=True)
        stack.callback(writer.detach)
        inputs = [models[source.path] for source in plan.sources]
        targets.append(Target(plan, inputs, models[plan.base.path] if plan.base else None, writer))
    return targets


def remaining(outputs: Sequence[Output]) -> list[Unit]:
    """Return the units that are not recorded for all outputs, in the order of the plan."""
    done = set.intersection(*(set(journal.finished(partial)) for _, partial in outputs))
    return [unit for unit in outputs[0][0].units if unit not in done]


def _runners(
    targets: Sequence[Target], units: Sequence[Unit], chunk_bytes: int, cores: int
) -> Iterator[tuple[Runner, Sequence[Unit]]]:
    """Yield what merges the units, first those without torch."""
    if len(targets) > 1:
        yield MeansRunner(targets, chunk_bytes), units
        return
    by_torch = frozenset(targets[0].plan.specs) if torch_is_loaded() else with_torch(targets[0])
    if first := [unit for unit in units if unit.name not in by_torch]:
        yield NumpyRunner(targets[0], chunk_bytes, cores), first
    if rest := [unit for unit in units if unit.name in by_torch]:
        yield UnitRunner(targets[0], chunk_bytes), rest


def _shares(outputs: Sequence[Output], forks: bool) -> Shares:
    """Return how units are shared out to processes. Imports torch if most of them need it and are forks of this one."""
    plan = outputs[0][0]
    if len(outputs) > 1:
        by_torch, hashed, direct = frozenset(plan.specs), frozenset[Unit](), False
    else:
        with ExitStack() as stack:
            (target,) = _targets(outputs, stack)
            by_torch, direct = with_torch(target), target.writer.is_direct
            hashed = frozenset(unit for unit in plan.units if kept_hash(target, unit) is not None)
    sizes = {name: spec.nbytes for name, spec in plan.specs.items()}
    if forks and 2 * sum(sizes[name] for name in by_torch) > sum(sizes.values()):
        importlib.import_module("torch")  # once, instead of in each forked process
    return Shares(plan, frozenset() if torch_is_loaded() else by_torch, hashed, direct)


def merge_in_processes(outputs: Sequence[Output], jobs: int | None, *, chunk_bytes: int) -> None:
    """Merge all units on this host, in this process and `jobs` - 1 others."""
    # Threads wait for each other between the short steps of a piece, so processes are twice as fast.
    forks, large = may_fork(), any(plan.is_large for plan, _ in outputs)
    if jobs is None:
        jobs = min(visible_cores(), MOST) if forks and large else 1
    units = remaining(outputs)
    given = [units] if jobs == 1 else _shares(outputs, forks and large).of(units, jobs)
    share = functools.partial(merge_share, outputs, size=jobs, chunk_bytes=chunk_bytes, given=given)
    with Bar(outputs) as bar:
        if jobs == 1:
            return share(0, bar=bar)
        with lost_workers_told(), process_pool(jobs - 1, forks=forks) as pool:
            others = {pool.submit(share, rank) for rank in range(1, jobs)}
            share(0, bar=bar)
            while others:
                done, others = wait(others, timeout=_BAR_SECONDS, return_when=FIRST_COMPLETED)
                for other in done:
                    other.result()
                bar.update()
    return None


def _run_all(
    units: Sequence[Unit],
    run: Runner,
    threads: tuple[int, int],
    note: Callable[[Sequence[Merged]], None],
    bar: Bar | None,
) -> None:
    """Run units in threads, recording completed ones every `_NOTE_EVERY` bytes; the first error stops the rest.

    `threads` is how many threads take units from the front, and how many from the end.
    """
    done: list[Merged] = []
    unnoted = 0
    line = deque(units)

    def run_from(end: Callable[[], Unit]) -> Merged | None:
        try:
            unit = end()
        except IndexError:
            return None  # threads at the other end took it
        return run(unit)

    with ExitStack() as stack:
        finished: SimpleQueue[Future[Merged | None]] = SimpleQueue()  # to wait for the first of many futures is slow
        pools, waiting = [], 0
        for count, end in zip(threads, (line.popleft, line.pop), strict=True):
            if count:
                pools.append(stack.enter_context(ThreadPoolExecutor(count)))
                for _ in units:
                    pools[-1].submit(run_from, end).add_done_callback(finished.put)
                    waiting += 1
        try:
            while waiting:
                future = finished.get()
                waiting -= 1
                failed = future.exception()
                if failed is None and (merged := future.result()) is not None:
                    done.append(merged)
                    unit, _ = merged
                    unnoted += sum(
                        (unit.stop - unit.start) * target.plan.specs[unit.name].itemsize for target in run.targets
                    )
                if done and (unnoted >= _NOTE_EVERY or failed or not waiting):
                    note(done)
                    done, unnoted = [], 0
                if bar is not None:
                    bar.update()
                if failed is not None:
                    raise failed
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
