"""A crowd of processes works on one run; then one process repeats what they committed: `storm.py SPEC.json`.

A spec has `folder`, `processes`, `seconds` and `outcome`, the file for the number of calls by verb and exit code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.crowded_run import EXPERTS, FRIENDS, NEW_TEXTS, crowded_run
from helpers.forked_commands import LastingGroup, call, ended, forked, run_forked
from helpers.worlds import read_spec

from btm_scale.config.run import RunConfig
from btm_scale.forest import membership
from btm_scale.forest.average_models import average_texts
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import all_texts
from btm_scale.run import grow, pipeline
from btm_scale.run.state import state_at_rest
from btm_scale.run_dir import SEED, RunDir
from btm_scale.util.pools import CORES
from btm_scale.util.rank_log import FailureNote

Words = tuple[str, ...]
State = tuple[str, str]  # domains and experts

_LEAST = 8  # commands of each process, however slow the machine

_PARENTS = ("seed", "nearest", "posterior", "code=0.3,prose=0.7", "friend")
# Refusals of commands that come at the wrong moment; each is one sentence with exit code 2.
_REFUSALS = re.compile(
    r"btm-scale: (Unknown expert|The forest of .* already has an expert|'\w+' is already an expert|"
    r".* not scored on every domain|.* is not a finished expert|\w+ cannot branch from|There are no results|"
    r"Domain '\w+' already has text)"
)


class Crowd:
    """The commands of one process, and a file with those of all processes in the order in which they were committed."""

    def __init__(self, folder: Path, run: RunDir, number: int) -> None:
        self._folder = folder
        self._run = run
        self._random = random.Random(number)
        self._words: Words = ()

    def work(self, until: float) -> int:
        """Give commands until a time, but a few at least; returns 0 if each ended as it should."""
        self._note_commits()
        wrong = given = 0
        while time.monotonic() < until or given < _LEAST:
            given += 1
            self._words = self._command()
            code = call(*self._words)
            verb = " ".join(word for word in self._words[:2] if "/" not in word)
            self.note("calls", [verb, code])
            wrong += code not in (0, 2)
        return int(wrong > 0)

    def note(self, file: str, value: Any) -> None:
        """Append a line; lines of several processes never mix."""
        line = json.dumps(value) + "\n"
        descriptor = os.open(self._folder / file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)

    def _command(self) -> Words:
        pick, root = self._random.choice, str(self._run.root)
        domain = pick(NEW_TEXTS)
        source = str(RunDir(self._folder).model(pick(FRIENDS)))
        text = str(self._folder / f"{domain}.jsonl")
        return pick(
            (
                ("forest", "add", root, source, "--name", pick(FRIENDS)),
                ("forest", "add", root, source, "--name", pick(FRIENDS)),
                ("forest", "remove", root, pick((*FRIENDS, *NEW_TEXTS))),
                ("branch", root, "--name", domain, "--from", pick(_PARENTS), "--text", text),
                ("score", root),
                ("evaluate", root),
                ("report", root),
                pick((("status", root), ("forest", "list", root), ("forest", "lineage", root))),
            )
        )

    def _note_commits(self) -> None:
        """Note each change while its lock is held, and each evaluation with what it saw."""
        settle, removing, publish, evaluate = grow._branch, grow.removing, membership.new_directory, pipeline.evaluate

        def noted_branch(*arguments: Any) -> Any:
            settled = settle(*arguments)
            self.note("commits", self._words)
            return settled

        @contextlib.contextmanager
        def noted_removal(*arguments: Any) -> Iterator[None]:
            with removing(*arguments):
                yield
                self.note("commits", self._words)

        @contextlib.contextmanager
        def noted_directory(*arguments: Any, **settings: Any) -> Iterator[Path]:
            with publish(*arguments, **settings) as directory:
                yield directory
            self.note("commits", self._words)

        def noted_evaluation(config: RunConfig, run: RunDir) -> Any:
            results = evaluate(config, run)
            self.note("evaluations", [*seen(config, run), digest(run.results)])
            return results

        grow._branch, grow.removing = noted_branch, noted_removal
        membership.new_directory, pipeline.evaluate = noted_directory, noted_evaluation


def seen(config: RunConfig, run: RunDir) -> State:
    """Return the domains and experts that an evaluation depends on."""
    forest = {name: expert.content_hash for name, expert in experts(run).items()}
    return ",".join(config.all_domains), json.dumps(forest)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def score_after_interruptions(run: RunDir) -> None:
    """Score all models; what an earlier attempt was interrupted by must no longer be reported."""
    config = RunConfig.load(run.config)
    folder = run.train("code")
    folder.mkdir(parents=True)
    (folder / "stopped").touch()
    note = FailureNote(rank=3, ranks=4, host="node-3", time=1.0, error="CUDA error: an illegal memory access")
    note.save(folder / "log.failed-3.json")
    assert state_at_rest(config, run, "code") == "stopped"
    assert call("score", run.root) == 0
    assert state_at_rest(config, run, "code") == "done"
    assert list(folder.iterdir()) == []


def repeat(folder: Path, run: RunDir) -> None:
    """Give each command twice, as a batch system that retries a finished job does."""
    yaml, root, one = str(folder / "crowd.yaml"), str(run.root), str(folder / "one.jsonl")
    friend = str(RunDir(folder).model("friend"))
    own = ("--out", root)
    for words in (
        ("prepare", yaml, *own),
        ("train", yaml, *own),
        ("run", yaml, *own),
        ("plan", yaml, "--nodes", "1"),
        ("score", root),
        ("ablate", root),
        ("forest", "add", root, friend, "--name", "friend"),
        ("branch", root, "--name", "one", "--text", one),
        ("score", root),
        ("evaluate", root),
        ("report", root),
    ):
        assert call(*words) == 0, words
        before = {path: digest(path) for path in (run.config, run.results, run.report) if path.exists()}
        assert call(*words) == 0, words
        assert {path: digest(path) for path in before} == before, words
    for name in ("friend", "one", "friend", "one"):
        assert call("forest", "remove", root, name) == 0
    assert call("forest", "remove", root, "physics") == 2


def finish(run: RunDir) -> dict[str, str]:
    """Score, evaluate and report; returns digests of what the run then holds."""
    for words in (("score",), ("evaluate",), ("report",)):
        assert call(*words, run.root) == 0, words
    config = RunConfig.load(run.config)
    models = {name: all_texts(config) for name in (SEED, *experts(run))} | average_texts(config)
    files = [run.config, run.removed, run.results, run.report]
    files += [run.branch(name) for name in (*NEW_TEXTS, *EXPERTS) if run.branch(name).exists()]
    files += [run.scores(name, *text) for name, texts in models.items() for text in texts]
    files += [run.model(name) / file for name in models for file in ("expert.json", "config.json", "model.safetensors")]
    return {str(path.relative_to(run.root)): digest(path) for path in files}


class Evaluations:
    """Evaluates copies of a run in forked processes, a few at a time, and compares each with the crowd's results."""

    def __init__(self, folder: Path, expected: dict[State, set[str]]) -> None:
        assert all(len(digests) == 1 for digests in expected.values()), "two evaluations of one state differ"
        self._folder = folder
        self._left = {state: digests.pop() for state, digests in expected.items()}
        self._running: dict[int, Path] = {}

    def repeat(self, run: RunDir) -> None:
        """Evaluate the run as it is now, if the crowd did in this state and it has not been repeated."""
        if (expected := self._left.pop(seen(RunConfig.load(run.config), run), None)) is None:
            return
        assert call("score", run.root) == 0
        if len(self._running) == CORES:
            self._wait()
        copy = RunDir(self._folder / f"state{len(self._left)}")
        shutil.copytree(run.root, copy.root)
        log = copy.root.with_suffix(".log")
        self._running[forked(functools.partial(self._compare, copy, expected), log)] = log

    def end(self) -> None:
        """Wait for the last ones; each state that the crowd evaluated must have been one of the run's."""
        while self._running:
            self._wait()
        assert not self._left, f"evaluations of states that never were: {self._left}"

    def _wait(self) -> None:
        pid, log = next(iter(self._running.items()))
        del self._running[pid]
        assert ended(pid) == 0, log.read_text()
        shutil.rmtree(log.with_suffix(""))

    @staticmethod
    def _compare(copy: RunDir, expected: str) -> int:
        pipeline.here = lambda place: functools.partial(run_forked)
        code = call("evaluate", copy.root)
        if code == 0 and digest(copy.results) != expected:
            print(f"The crowd's results differ from these of the same state: {copy.results.read_text()}")
            return 1
        return code


def replay(run: RunDir, original: RunDir, commits: list[Words], evaluations: Evaluations) -> None:
    """Repeat the commits in their order, and the evaluations of the states between them.

    One rank scores for all commands: a group for each would take most of the time.
    """
    group = LastingGroup(run.root.with_name("group.log"))
    pipeline.here = lambda place: group
    for words in [(), *commits]:
        if words:
            assert call(*(str(run.root) if word == str(original.root) else word for word in words)) == 0, words
        evaluations.repeat(run)
    assert group.end() == 0
    pipeline.here = lambda place: functools.partial(run_forked)
    evaluations.end()


def main() -> None:
    spec = read_spec()
    folder = Path(spec["folder"])
    for module in ("deepspeed", "rich.console", "plotly.offline", "btm_scale.report.sections", "btm_scale.run.worker"):
        importlib.import_module(module)  # before the processes fork
    pipeline.here = lambda place: functools.partial(run_forked)
    run = crowded_run(folder)
    score_after_interruptions(run)
    assert call("evaluate", run.root) == 0
    repeat(folder, run)
    serial = RunDir(folder / "serial")
    shutil.copytree(run.root, serial.root)
    until = time.monotonic() + spec["seconds"]
    logs = [folder / f"process{number}.log" for number in range(spec["processes"])]
    crowd = [forked(functools.partial(Crowd(folder, run, number).work, until), log) for number, log in enumerate(logs)]
    codes = [ended(pid) for pid in crowd]
    printed = "".join(log.read_text() for log in logs)
    calls = Counter(tuple(one) for one in lines(folder / "calls"))
    strange = [line for line in printed.splitlines() if line.startswith("btm-scale:") and not _REFUSALS.match(line)]
    problem = "\n".join(log.read_text()[-3000:] for log, code in zip(logs, codes, strict=True) if code)
    assert not any(codes), f"{calls}\n{problem}"
    assert "Traceback" not in printed, printed
    assert not strange, strange
    leftovers = [str(path) for path in run.root.rglob(".*") if path.name.endswith((".removed", ".partial"))]
    assert not leftovers, leftovers
    evaluations: dict[State, set[str]] = {}
    for domains, forest, results in lines(folder / "evaluations"):
        evaluations.setdefault((domains, forest), set()).add(results)
    commits = [tuple(words) for words in lines(folder / "commits")]
    states = len(evaluations)
    replay(serial, run, commits, Evaluations(folder, evaluations))
    crowded, alone = finish(run), finish(serial)
    assert crowded.keys() == alone.keys()
    differing = [path for path in crowded if crowded[path] != alone[path]]
    assert not differing, differing
    table = {" ".join(map(str, one)): count for one, count in calls.items()}
    Path(spec["outcome"]).write_text(json.dumps({"calls": table, "commits": len(commits), "states": states}))


if __name__ == "__main__":
    main()
