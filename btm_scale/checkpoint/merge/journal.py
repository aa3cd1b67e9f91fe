"""The on-disk journal of a merge: completed units, from which it resumes and through which processes report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from btm_scale.checkpoint.formats.rounded import Counts, NonFinite
from btm_scale.checkpoint.merge.plan import Unit
from btm_scale.errors import CheckpointError
from btm_scale.util.bounded_json import parse_json
from btm_scale.util.disk_errors import is_transient
from btm_scale.util.files import is_private, sync_directory, write_file
from btm_scale.util.locks import held

_PLAN = "plan.fingerprint"


@contextmanager
def only_merge_into(partial: Path) -> Iterator[None]:
    """Lock `partial` for writing. Raises `CheckpointError` if another process holds the lock or it is not writable."""
    lock = partial.with_name(f"{partial.name}.lock")
    with ExitStack() as stack:
        try:
            is_ours = stack.enter_context(held(lock))
        except OSError as error:
            if is_transient(error):
                raise
            raise CheckpointError(f"Cannot write to {lock.parent}: {error}. Choose another output.") from error
        if not is_ours:
            raise CheckpointError(f"Another process is writing {partial}. Wait for it, or stop it.")
        yield


def can_resume(partial: Path, fingerprint: str) -> bool:
    """Whether `partial` was started by the same merge, and only this user can write to it."""
    note = partial / _PLAN
    return is_private(partial) and note.is_file() and note.read_bytes() == fingerprint.encode()


def begin(partial: Path, fingerprint: str) -> None:
    """Record which merge the shards belong to, once they are allocated."""
    write_file(partial / _PLAN, fingerprint)


def record(partial: Path, rank: int, done: Sequence[tuple[Unit, Sequence[str]]]) -> None:
    """Record units whose bytes are on disk, with their block hashes."""
    lines = [json.dumps([unit.name, unit.start, unit.stop, *hashes]) for unit, hashes in done]
    with (partial / f"done-{rank:05d}.jsonl").open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")  # the first line break ends a line that a kill truncated


def record_nonfinite(partial: Path, rank: int, counted: Mapping[Unit, Sequence[Counts]]) -> None:
    """Record what is not finite in units, before these are recorded as completed."""
    lines = [json.dumps([unit.name, unit.start, list(map(list, counts))]) for unit, counts in counted.items()]
    if lines:
        with (partial / f"nonfinite-{rank:05d}.jsonl").open("a") as file:
            file.write("\n" + "\n".join(lines) + "\n")


def nonfinite(partial: Path) -> NonFinite:
    """Return what any process recorded that is not finite."""
    units: dict[tuple[str, int], list[Counts]] = {}
    for file in sorted(partial.glob("nonfinite-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                name, start, counts = parse_json(line)
                units[name, start] = [(int(nan), int(infinite), int(made)) for nan, infinite, made in counts]
            except (TypeError, ValueError):
                continue  # a kill truncated it, and its unit is not recorded as completed
    by_name: dict[str, list[Counts]] = {}
    for (name, _), rows in units.items():
        by_name.setdefault(name, []).extend(rows)
    return NonFinite.total(by_name)


def finished(partial: Path) -> dict[Unit, list[str]]:
    """Return the units recorded by any process, with their block hashes."""
    done: dict[Unit, list[str]] = {}
    for file in sorted(partial.glob("done-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                name, start, stop, *hashes = parse_json(line)
            except (TypeError, ValueError):
                continue
            if all(isinstance(text, str) for text in (name, *hashes)) and type(start) is type(stop) is int:
                done[Unit(name, start, stop)] = hashes
    return done


def clear(partial: Path) -> None:
    """Remove the journal from a directory that is about to be published."""
    for file in [partial / _PLAN, *partial.glob("nonfinite-*.jsonl"), *partial.glob("done-*.jsonl")]:
        file.unlink()
    sync_directory(partial)
