"""Which parts of a merge are done, on disk: how an interrupted one goes on, and how processes report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from btm_scale.checkpoint.merge.plan import Unit
from btm_scale.errors import CheckpointError
from btm_scale.util.files import is_private, sync_directory, write_file
from btm_scale.util.locks import held

_PLAN = "plan.fingerprint"


@contextmanager
def only_merge_into(partial: Path) -> Iterator[None]:
    """Hold the right to write `partial`; raises `CheckpointError` while another process has it, or if none can."""
    lock = partial.with_name(f"{partial.name}.lock")
    with ExitStack() as stack:
        try:
            is_ours = stack.enter_context(held(lock))
        except OSError as error:
            raise CheckpointError(f"{lock.parent} cannot be written to: {error}. Choose another output.") from error
        if not is_ours:
            raise CheckpointError(f"another process is writing {partial}. Wait for it, or stop it.")
        yield


def can_resume(partial: Path, fingerprint: str) -> bool:
    """Whether `partial` holds the beginning of this very merge, written by this user alone."""
    note = partial / _PLAN
    return is_private(partial) and note.is_file() and note.read_text() == fingerprint


def begin(partial: Path, fingerprint: str) -> None:
    """Note, once the shards are laid out, whose they are."""
    write_file(partial / _PLAN, fingerprint)


def record(partial: Path, rank: int, done: Sequence[tuple[Unit, Sequence[str]]]) -> None:
    """Note units whose bytes are on the disk, with the hashes of their blocks."""
    lines = [json.dumps([unit.name, unit.start, unit.stop, *hashes]) for unit, hashes in done]
    with (partial / f"done-{rank:05d}.jsonl").open("a") as file:
        file.write("\n" + "\n".join(lines) + "\n")  # the first line break ends a line that a kill cut short


def finished(partial: Path) -> dict[Unit, list[str]]:
    """The units that any process noted, with the hashes of their blocks."""
    done: dict[Unit, list[str]] = {}
    for file in sorted(partial.glob("done-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                name, start, stop, *hashes = json.loads(line)
            except ValueError:
                continue
            done[Unit(name, start, stop)] = hashes
    return done


def clear(partial: Path) -> None:
    """Remove the notes from a directory that is about to be published."""
    for file in [partial / _PLAN, *partial.glob("done-*.jsonl")]:
        file.unlink()
    sync_directory(partial)
