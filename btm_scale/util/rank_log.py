"""What every rank of a group leaves behind: a log of its own, and a record of its failure if it fails.

When one rank fails, all others of its group fail after it, with errors that tell of nothing but a lost connection. The
records have times, so the rank to ask is found whatever started the group.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from btm_scale.errors import UserError
from btm_scale.util.files import make_directory
from btm_scale.util.logs import set_up_logging
from btm_scale.util.records import Record

logger = logging.getLogger(__name__)

_LINES = 25
_TAIL_BYTES = 32_768
_SILENT = "ended without a word (killed, or its host is lost)"
_UNTOLD = "ended, and no rank has told why (killed, perhaps for memory, or its host is lost)"
# What a rank says that has lost another one.
_PEER_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Connection refused",
    "NCCL",
    "gloo",
    "recvValue",
)


@dataclass(frozen=True)
class Failure:
    """Why a group failed: which rank, on which host, its error, and the last lines of its own log."""

    rank: int
    ranks: int
    host: str
    error: str
    lines: tuple[str, ...]
    log: Path

    def __str__(self) -> str:
        where = f"rank {self.rank} of {self.ranks} on {self.host}" if self.ranks > 1 else self.host
        tail = "\n".join(f"  {line}" for line in self.lines)
        return f"{where}: {self.error}\nthe end of {self.log}:\n{tail}"


class FailureNote(Record):
    """`log.failed-R.json`: what one rank left behind when it failed."""

    rank: int
    ranks: int
    host: str
    time: float
    error: str
    mistake: bool = False  # the user's: another try would end as this one

    @property
    def tells_of_another(self) -> bool:
        """Whether the error is the loss of another rank."""
        return any(sign in self.error for sign in _PEER_LOST)


def log_of_rank(log: Path, rank: int) -> Path:
    """The log of one rank: the group's for its first, `log.R` for any other."""
    return log if rank == 0 else log.with_name(f"{log.name}.{rank}")


@contextlib.contextmanager
def rank_log(log: Path, model: str | None = None) -> Iterator[None]:
    """Send what this rank logs and prints to its own log; if the block fails, leave a record before it raises.

    Messages have the rank and, if given, the model in front.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    make_directory(log.parent)
    _note_path(log, rank).unlink(missing_ok=True)
    _print_to(log_of_rank(log, rank))
    set_up_logging(model)
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        told = "".join(traceback.format_exception_only(error)).strip()
        mistake = isinstance(error, UserError)
        note = FailureNote(
            rank=rank, ranks=ranks, host=socket.gethostname(), time=time.time(), error=told, mistake=mistake
        )
        note.save(_note_path(log, rank))
        raise


def note_silent_failure(log: Path, ranks: int) -> None:
    """Leave a record of a group that has failed, if none of its ranks did: `status` would take it for one to come."""
    if read_failure(log) is None:
        note = FailureNote(rank=0, ranks=ranks, host="its host", time=time.time(), error=_UNTOLD)
        note.save(_note_path(log, 0))


def _print_to(path: Path) -> None:
    with path.open("ab") as own:
        if os.path.sameopenfile(own.fileno(), 1):
            return  # the launcher has seen to it
        logger.info("this rank logs to %s", path)
        sys.stderr.flush()
        os.dup2(own.fileno(), 1)
        os.dup2(own.fileno(), 2)


def forget_failure(log: Path) -> None:
    """Remove the records of an earlier try."""
    for path in log.parent.glob(f"{log.name}.failed-*"):
        path.unlink(missing_ok=True)


def read_failure(log: Path) -> Failure | None:
    """Why the group with this log failed last, or None if no rank has told of a failure."""
    records = []
    for path in log.parent.glob(f"{log.name}.failed-*.json"):
        with contextlib.suppress(UserError):
            records.append(FailureNote.load(path))
    if not records:
        return None
    first = min(records, key=lambda record: (record.tells_of_another, record.time))
    silent = sorted(set(range(first.ranks)) - {record.rank for record in records})
    said = _last_line(first.error)
    if not first.tells_of_another or not silent:
        return _failure(log, first, first.rank, first.host, said)
    word = f"{_SILENT}; rank {first.rank} then said: {said}"
    return _failure(log, first, silent[0], "its host", word)


def _failure(log: Path, record: FailureNote, rank: int, host: str, error: str) -> Failure:
    return Failure(rank, record.ranks, host, error, tail(log, rank), log_of_rank(log, rank))


def tail(log: Path, rank: int = 0) -> tuple[str, ...]:
    """The last lines of a rank's log."""
    try:
        with log_of_rank(log, rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return tuple(file.read().decode(errors="replace").splitlines()[-_LINES:])
    except FileNotFoundError:
        return ()


def _note_path(log: Path, rank: int) -> Path:
    return log.with_name(f"{log.name}.failed-{rank}.json")


def _last_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.strip()]
    return lines[-1] if lines else error
