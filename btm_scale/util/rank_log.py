"""The log of each rank of a group, and a failure record if the rank fails.

When one rank fails, the others of its group fail after it, with errors that only report a lost connection. The records
have times, which identify the rank that failed first, whichever launcher started the group.
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
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from btm_scale.errors import GroupFailed, PortTaken, UserError
from btm_scale.util.files import make_directory, open_to_append
from btm_scale.util.logs import set_up_logging
from btm_scale.util.records import Record, is_empty
from btm_scale.util.secrets import masked

logger = logging.getLogger(__name__)

_LINES = 25
_TAIL_BYTES = 32_768
_SILENT = "exited without an error (killed, or its host is lost)"
_UNREPORTED = "exited, and no rank reported an error (killed, perhaps for memory, or its host is lost)"
# Errors of a rank that lost another one.
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
    """Why a group failed: the rank, its host, its error, and the last lines of its log.

    `sentence`: whether the error is a message for the user, which needs no log to be understood.
    """

    rank: int
    ranks: int
    host: str
    error: str
    lines: tuple[str, ...]
    log: Path
    sentence: bool = False
    mistake: bool = False
    port_taken: bool = False

    def __str__(self) -> str:
        if self.sentence:
            return self.error
        where = f"rank {self.rank} of {self.ranks} on {self.host}" if self.ranks > 1 else self.host
        tail = "\n".join(f"  {line}" for line in self.lines)
        return f"{where}: {self.error}\nthe end of {self.log}:\n{tail}"


class FailureNote(Record):
    """`log.failed-R.json`: the failure of one rank."""

    rank: int
    ranks: int
    host: str
    time: float
    error: str
    mistake: bool = False  # of the user: a retry would fail in the same way
    sentence: bool = False  # the error is a message for the user, without the name of an exception
    port_taken: bool = Field(default=False, exclude_if=is_empty)  # another port helps

    @property
    def is_secondary(self) -> bool:
        """Whether the error is the loss of another rank."""
        return not self.sentence and any(sign in self.error for sign in _PEER_LOST)


def log_of_rank(log: Path, rank: int) -> Path:
    """Return the log of one rank: the log of the group for rank 0, `log.R` for any other."""
    return log if rank == 0 else log.with_name(f"{log.name}.{rank}")


@contextlib.contextmanager
def rank_log(log: Path, model: str | None = None) -> Iterator[None]:
    """Redirect what this rank logs and prints to its own log; if the block raises, save a failure record.

    Messages have the rank and, if given, the model as a prefix.
    """
    rank = int(os.environ.get("RANK", "0"))
    make_directory(log.parent)
    _note_path(log, rank).unlink(missing_ok=True)
    _print_to(log_of_rank(log, rank))
    set_up_logging(model)
    with noting_failure(log):
        try:
            yield
        except Exception as error:
            if not isinstance(error, UserError | GroupFailed):  # the command prints a sentence as it ends
                sys.stderr.write(masked(traceback.format_exc()))
            raise


@contextlib.contextmanager
def noting_failure(log: Path) -> Iterator[None]:
    """If the block raises, save a failure record beside the log of this rank."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        yield
    except Exception as error:
        is_sentence = isinstance(error, UserError | GroupFailed)
        message = masked(str(error) if is_sentence else "".join(traceback.format_exception_only(error)).strip())
        note = FailureNote(
            rank=rank,
            ranks=ranks,
            host=socket.gethostname(),
            time=time.time(),
            error=message,
            mistake=isinstance(error, UserError),
            sentence=is_sentence,
            port_taken=isinstance(error, PortTaken),
        )
        with contextlib.suppress(OSError):  # the disk may be what failed
            make_directory(log.parent)
            note.save(_note_path(log, rank))
        raise


def note_silent_failure(log: Path, ranks: int) -> None:
    """Save a record of a failed group whose ranks left none; without it, `status` would show it as waiting."""
    if read_failure(log) is None:
        note = FailureNote(rank=0, ranks=ranks, host="its host", time=time.time(), error=_UNREPORTED)
        note.save(_note_path(log, 0))


def _print_to(path: Path) -> None:
    with open_to_append(path) as own:
        if os.path.sameopenfile(own.fileno(), 1):
            return  # the launcher has redirected it
        logger.info("this rank logs to %s", path)
        sys.stderr.flush()
        os.dup2(own.fileno(), 1)
        os.dup2(own.fileno(), 2)


def forget_failure(log: Path) -> None:
    """Remove the failure records of an earlier attempt."""
    for path in log.parent.glob(f"{log.name}.failed-*"):
        path.unlink(missing_ok=True)


def read_failure(log: Path) -> Failure | None:
    """Return why the group with this log failed last; None if no rank has a failure record."""
    records = []
    for path in log.parent.glob(f"{log.name}.failed-*.json"):
        with contextlib.suppress(UserError):
            records.append(FailureNote.load(path))
    if not records:
        return None
    first = min(records, key=lambda record: (record.is_secondary, record.time))
    silent = sorted(set(range(first.ranks)) - {record.rank for record in records})
    if first.sentence:
        failure = _failure(log, first, first.rank, first.host, first.error)
        return replace(failure, sentence=True, mistake=first.mistake, port_taken=first.port_taken)
    error = _last_line(first.error)
    if not first.is_secondary or not silent:
        return _failure(log, first, first.rank, first.host, error)
    error = f"{_SILENT}; rank {first.rank} then reported: {error}"
    return _failure(log, first, silent[0], "its host", error)


def _failure(log: Path, record: FailureNote, rank: int, host: str, error: str) -> Failure:
    return Failure(rank, record.ranks, host, error, tail(log, rank), log_of_rank(log, rank))


def tail(log: Path, rank: int = 0) -> tuple[str, ...]:
    """Return the last lines of the log of a rank; empty if there is no log."""
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
