"""Run inputs of the fuzzer in this process, each within 5 seconds of CPU time and 1 GB.

To repeat the input that a failure names: `PYTHONPATH=tests python -m fuzz.runner --seed N`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from btm_scale.errors import UserError
from fuzz.corpus import copy_of, make_corpus
from fuzz.mutators import mutate
from fuzz.targets import FOREIGN, ORIGINAL, TARGETS, Target, targets_of

_CPU_SECONDS = 5
_WALL_SECONDS = 30  # for an input that waits, on a busy machine
_MAX_GROWTH = 1 << 30  # bytes of resident memory
_ADDRESSES = 6 << 30  # beyond what the process has mapped: keeps a failing input from harming the machine


class Hang(BaseException):
    """An input took too long."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one input: `accepted`, `refused`, or what is wrong."""

    seed: int
    kind: str
    files: tuple[str, ...]
    verdict: str

    @property
    def failed(self) -> bool:
        """Whether a property does not hold."""
        return self.verdict not in ("accepted", "refused")

    def __str__(self) -> str:
        how = f"PYTHONPATH=tests python -m fuzz.runner --seed {self.seed}"
        return f"{self.kind} {', '.join(self.files)}: {self.verdict}\n  Repeat it: {how}"


def run_input(corpus: Path, seed: int, keep: Path | None = None) -> Outcome:
    """Mutate a file or two of one kind, read the folder, and check every property."""
    draw = Random(seed)
    target = _drawn(draw, seed)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = copy_of(corpus, target.kind, Path(name) / target.kind)
        (Path(name) / ORIGINAL).symlink_to(corpus / target.kind)
        files = _mutate_files(draw, target, folder)
        if keep is not None:
            shutil.copytree(folder, keep / str(seed))
        before = _listing(Path(name))
        verdict = _verdict(target, folder)
        litter = _listing(Path(name)) - before
        if verdict == "accepted" or target.kind == "run":
            litter -= {f"{target.kind}/report.html"}
        if litter and verdict in ("accepted", "refused"):
            verdict = f"left {sorted(litter)}"
    return Outcome(seed, target.kind, files, verdict)


def kind_of(seed: int) -> str:
    """Return the kind of the files that an input mutates."""
    return _drawn(Random(seed), seed).kind


def _drawn(draw: Random, seed: int) -> Target:
    targets = targets_of(seed)
    return draw.choices(targets, [target.weight for target in targets])[0]


def check_corpus(corpus: Path) -> None:
    """Read every kind unmutated, which must succeed; also imports what is imported late."""
    problems = []
    for target in [*TARGETS, *FOREIGN]:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            try:
                (Path(name) / ORIGINAL).symlink_to(corpus / target.kind)
                target.read(copy_of(corpus, target.kind, Path(name) / target.kind))
            except Exception:
                problems.append(f"{target.kind}: {traceback.format_exc()}")
    assert not problems, "\n".join(problems)


def _mutate_files(draw: Random, target: Target, folder: Path) -> tuple[str, ...]:
    mutated = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        pattern = draw.choice([pattern for pattern in target.files if any(folder.glob(pattern))])
        file = draw.choice(sorted(file for file in folder.glob(pattern) if file.is_file()))
        file.write_bytes(mutate(draw, file.read_bytes(), file.name))
        mutated.append(str(file.relative_to(folder)))
    return tuple(mutated)


def _verdict(target: Target, folder: Path) -> str:
    _reset_peak()
    before = _memory("VmRSS")
    verdict = "accepted"
    try:
        with _limits():
            target.read(folder)
    except UserError as error:
        verdict = "refused" if str(error).strip() else "refused without a message"
    except Hang:
        verdict = f"took more than {_CPU_SECONDS} s of CPU time or {_WALL_SECONDS} s\n{traceback.format_exc()}"
    except BaseException:
        verdict = f"ended in a traceback\n{traceback.format_exc()}"
    growth = _memory("VmHWM") - before
    return verdict if growth < _MAX_GROWTH else f"took {growth >> 20} MiB of memory, and was {verdict}"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _ADDRESSES, hard))
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, _CPU_SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, _WALL_SECONDS)}
    former = {number: signal.signal(number, stop) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in former.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _memory(name: str) -> int:
    """Return a size of this process in bytes: VmSize, VmRSS or its peak VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def main() -> int:
    """Run some inputs and print those that fail."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="the first input")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--kind", action="append", help="count only inputs of this kind; may be repeated")
    parser.add_argument("--corpus", type=Path, help="a folder to make the corpus in, or that has it already")
    parser.add_argument("--keep", type=Path, help="a folder to copy the mutated files into")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-corpus-") as name:
        corpus = (arguments.corpus or Path(name)).resolve()
        if not (corpus / "model").exists():
            corpus.mkdir(exist_ok=True)
            make_corpus(corpus)
        check_corpus(corpus)
        verdicts: Counter[str] = Counter()
        failed = 0
        kinds = arguments.kind or [target.kind for target in targets_of(arguments.seed)]
        seeds = (seed for seed in itertools.count(arguments.seed) if kind_of(seed) in kinds)
        for seed in itertools.islice(seeds, arguments.count):
            outcome = run_input(corpus, seed, arguments.keep)
            verdicts[f"{outcome.kind} {outcome.verdict.split(chr(10))[0][:40]}"] += 1
            if outcome.failed or arguments.count == 1:
                failed += outcome.failed
                print(outcome, flush=True)
    if arguments.count > 1:
        print(*(f"{count:6d} {verdict}" for verdict, count in sorted(verdicts.items())), sep="\n")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main())
