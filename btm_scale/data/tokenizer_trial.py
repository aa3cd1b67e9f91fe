"""Tokenizers are untrusted: each is tried in a child process before this one loads it.

A tokenizer can crash its library, loop in a regular expression, or expand a text to gigabytes. The child has limits of
CPU time and memory. A tokenizer that passes is not tried again by this process, and a run's tokenizer by no other
process of this user: a note in the run's folder records that it passed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from btm_scale.data.tokenizer_note import is_noted, noting
from btm_scale.errors import DataError, UserError
from btm_scale.util.pools import may_fork

if TYPE_CHECKING:
    from btm_scale.data.tokenizer import Tokenizer

_CPU_SECONDS = 20
_WALL_SECONDS = 240.0  # for a child that waits, or a very busy machine
_MEMORY = 4 << 30
# What ids depend on, beside the vocabulary.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_MOST_FILE_BYTES = 1 << 28
# More ids than this per byte of text are not an encoding; NFKD expands a letter to 18 at most.
_IDS_PER_BYTE = 16
_RUN = 4_000
_SCRIPTS = (
    "é",
    "\u0301",
    "中",
    "ﷺ",
    "اب ",
    "👩\u200d👩\u200d👧 ",
    "a\u0300\u0316",
    "\u2581",
    "\u200b",
    "\ufffd",
    "\x00\x01",
)
_MIXED = ("ab", "a ", " \n", "\r\n", "1,", "a1", ". ", "''s", "<|", "</s>", "((", "http://", "_-", "A a.\t", "é1 中")
_passed: set[str] = set()  # kinds and digests of the tokenizers that this process or its parent tried
_PATTERN = re.compile(rb'"(?:String|Regex)"\s*:\s*("(?:[^"\\]|\\.)*")')


class NotUsable(Exception):  # noqa: N818 (callers complete its sentence)
    """Why a tokenizer cannot be used, to follow "The tokenizer in X "."""


def require_usable(directory: Path, kind: str, load: Callable[[Path], Tokenizer], files: tuple[str, ...]) -> None:
    """Load a tokenizer in a child process and encode and decode texts that are hard for a bad one.

    `kind` names what `load` makes; `files` are those that determine its ids. Raises NotUsable with the reason,
    or DataError. Raises OSError if a run's disk is full.
    """
    files = (*files, *_SETTINGS)
    key = f"{kind}-{_digest(directory, files)}"
    if key not in _passed:
        if not is_noted(directory, key, files):
            with noting(directory, key, files):
                _try(directory, kind, load)
        _passed.add(key)


def trials_passed() -> frozenset[str]:
    """Return what `trust_trials` takes in a process that this one spawns."""
    return frozenset(_passed)


def trust_trials(passed: frozenset[str]) -> None:
    """Do not repeat the trials of the process that spawned this one."""
    _passed.update(passed)


def _try(directory: Path, kind: str, load: Callable[[Path], Tokenizer]) -> None:
    # A rank may have memory registered with its network card, which forking can detach from it.
    forks = may_fork() and "RANK" not in os.environ
    answer, status = _forked(directory, load) if forks else _spawned(directory, kind)
    *_, doing = answer.strip().splitlines() or ["load it"]
    if doing.startswith("{"):
        problem, is_complete = json.loads(doing)["problem"]
        if problem:
            raise DataError(problem) if is_complete else NotUsable(problem)
        return
    if status is None or status in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        raise NotUsable(f"cannot be used: it did not {doing} within {_CPU_SECONDS} s")
    how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
    raise NotUsable(f"cannot be used: its library crashed or ran out of memory ({how}) when it had to {doing}")


def _digest(directory: Path, names: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (path := directory / name).is_file():
            size = path.stat().st_size
            if size > _MOST_FILE_BYTES:
                raise NotUsable(f"cannot be loaded: {name} has {size / 1e6:,.0f} MB. A tokenizer is smaller")
            digest.update(f"{name}\0{size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def _forked(directory: Path, load: Callable[[Path], Tokenizer]) -> tuple[str, int | None]:
    """Try a tokenizer in a fork of this process, which has its libraries loaded."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _try_and_exit(directory, load, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return _answer(pipe, lambda: os.kill(child, signal.SIGKILL), lambda: os.waitpid(child, 0)[1])


def _spawned(directory: Path, kind: str) -> tuple[str, int | None]:
    """Try a tokenizer in a new interpreter, because other threads of this one may hold locks."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "btm_scale.data.tokenizer_trial", str(directory), kind, str(writer)]
    child = subprocess.Popen(command, pass_fds=(writer,), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        return _answer(pipe, child.kill, lambda: -code if (code := child.wait()) < 0 else code << 8)


def _answer(pipe: Any, kill: Callable[[], None], wait: Callable[[], int]) -> tuple[str, int | None]:
    """Return what the child wrote and its exit code, negative for a signal; None if it had to be killed."""
    answer, deadline = b"", time.monotonic() + _WALL_SECONDS
    ended = False
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not ended and (left := deadline - time.monotonic()) > 0:
                if selector.select(left):
                    part = os.read(pipe.fileno(), 1 << 16)
                    ended = not part
                    answer += part
    finally:
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                kill()
        status = os.waitstatus_to_exitcode(wait())
    return answer.decode("utf-8", "replace"), status if ended else None


def _try_and_exit(directory: Path, load: Callable[[Path], Tokenizer], writer: int) -> NoReturn:
    """In the child: write each step to the pipe before it is taken, then the result as JSON."""
    code = 1
    try:
        _limit_itself(writer)
        problem = _problem(directory, load, lambda step: os.write(writer, f"{step}\n".encode()))
        os.write(writer, (json.dumps({"problem": problem}) + "\n").encode())
        code = 0
    finally:
        os._exit(code)


def _limit_itself(writer: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for quiet in (0, 1, 2):  # a panic in Rust prints a backtrace
        os.dup2(os.open(os.devnull, os.O_RDWR), quiet)
    os.closerange(3, writer)  # files that are locked as long as they are open
    os.closerange(writer + 1, writer + 1_000)
    signal.alarm(int(_WALL_SECONDS))  # if the parent is killed
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}  # a backtrace takes seconds and memory
    used = time.process_time()
    _lower(resource.RLIMIT_CPU, int(used) + _CPU_SECONDS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + _MEMORY)
    _lower(resource.RLIMIT_CORE, 0)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, hard))


def _problem(directory: Path, load: Callable[[Path], Tokenizer], step: Callable[[str], object]) -> tuple[str, bool]:
    """Return what is wrong with a tokenizer, and whether that is a complete message; ("", False) if nothing is."""
    from btm_scale.data.tokenizer import first_line

    step("load it")
    try:
        tokenizer = load(directory)
    except BaseException as error:  # a panic in Rust is not an Exception
        return (str(error), True) if isinstance(error, UserError) else (f"cannot be loaded: {first_line(error)}", False)
    for name, text in _probes(directory):
        try:
            step(f"encode {name}")
            ids = tokenizer.encode(text)
            step(f"decode {name}")
            tokenizer.decode(ids)
            again = tokenizer.encode(text)
        except DataError as error:
            if error.__cause__ is not None:  # a library's error is about one text; a panic is a bug
                continue
            return str(error), True
        if len(ids) > _IDS_PER_BYTE * len(text.encode()) + _IDS_PER_BYTE:
            return f"cannot be used: it encodes {name} as {len(ids):,} tokens", False
        if ids != again:
            return f"cannot be used: it encodes {name} in two ways. Remove the dropout from its model", False
    return "", False


def _probes(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text): runs of every ASCII character, other scripts, mixtures, and the literals of its patterns."""
    for character in map(chr, range(32, 127)):
        yield f"{character!r} repeated", character * 200
    literals = _literals(directory)
    for text in (" ", "a", "0", "\n", "\t", "-", *_MIXED, *_SCRIPTS, *literals):
        repeated = (text * _RUN)[: max(len(text), _RUN // len(text.encode()))]
        # The library searches only texts that hold every literal of a pattern.
        yield f"{text[:40]!r} repeated", f"{repeated}!{''.join(literals)}"


def _literals(directory: Path) -> list[str]:
    """Return the literal texts in the patterns of a tokenizer.json, whose repetition may be hard for them."""
    words: set[str] = set()
    with contextlib.suppress(OSError, ValueError):
        # Not parsed as JSON, which takes long for a large vocabulary.
        for pattern in _PATTERN.findall((directory / "tokenizer.json").read_bytes())[:100]:
            words.update(re.findall(r"\w+|[^\w\s]+", json.loads(pattern)[:10_000]))
    return sorted(words, key=len)[:30]


if __name__ == "__main__":
    from btm_scale.data.tokenizer import KINDS

    _try_and_exit(Path(sys.argv[1]), KINDS[sys.argv[2]], int(sys.argv[3]))
