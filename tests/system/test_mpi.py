"""One mpirun of six ranks, split into three groups that do not communicate: stopping one does not delay the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from helpers.cluster_run import EXPERTS, cluster_values
from helpers.held_training import HeldTraining
from helpers.in_process import answer
from helpers.mpirun import AS_ROOT, mpirun
from helpers.processes import wait_for
from helpers.tiny_run import btm_scale, write_config

from btm_scale.forest.expert import is_finished, read_expert
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow

STEPS = 60
STOPPED = "docs"


@dataclass
class Seen:
    """Observations while the three groups trained."""

    joined: set[tuple[str, str]] = field(default_factory=set)  # pairs of groups with a connection between them
    within: set[str] = field(default_factory=set)  # groups with connections inside
    samples: int = 0
    finished_beside: set[str] = field(default_factory=set)  # experts that finished while one group was suspended
    stopped_at: int = 0
    output: str = ""


def ranks_of(run: RunDir) -> dict[int, str]:
    """Return the model that each process of this run trains, by process id."""
    models = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--model" in words and str(run.root) in words:
            models[process.pid] = words[words.index("--model") + 1]
    return models


def connections(owners: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Yield the models at both ends of every TCP connection between processes of the run."""
    ends = {}
    for pid, model in owners.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_ESTABLISHED:
                    ends[connection.laddr.port, connection.raddr.port] = model
    for (local, remote), model in ends.items():
        other = ends.get((remote, local))
        if other is not None:
            yield model, other


@pytest.fixture(scope="module")
def run(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A prepared run with a trained seed LM: the first two of six ranks train it, the others are idle."""
    mpirun()  # or skip, before anything is prepared
    folder = tmp_path_factory.mktemp("mpi")
    write_config(folder / "run.yaml", cluster_values(real_text, steps=STEPS))
    run_dir = RunDir(folder / "run")
    answer("prepare", folder / "run.yaml", "--out", run_dir.root)
    process = _start(run_dir)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert is_finished(run_dir.model("seed"))
    return run_dir


@pytest.fixture(scope="module")
def seen(run: RunDir) -> Seen:
    """Train the three experts, with one group suspended by SIGSTOP until the others have finished."""
    observed = Seen()
    with HeldTraining(run.root.parent, {STOPPED: 1}) as held:
        process = _start(run, held.environment)
        wait_for(lambda: run.metrics(STOPPED).is_file() and bool(run.metrics(STOPPED).read_text()), process=process)
        stopped = [pid for pid, model in ranks_of(run).items() if model == STOPPED]
        _sample(run, observed)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
    try:
        others = [model for model in EXPERTS if model != STOPPED]
        observed.stopped_at = len(run.metrics(STOPPED).read_text().splitlines())
        wait_for(
            lambda: _sample(run, observed) and all(is_finished(run.model(model)) for model in others),
            process=process,
            poll=0.1,
        )
        observed.finished_beside = {model for model in EXPERTS if is_finished(run.model(model))}
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    observed.output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, observed.output
    return observed


def _start(run: RunDir, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [
        mpirun(),
        "-n",
        "6",
        sys.executable,
        "-m",
        "btm_scale.cli",
        "train",
        str(run.config),
        "--out",
        str(run.root),
        "--launcher",
        "mpi",
    ]
    return subprocess.Popen(
        [str(word) for word in command],
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        | AS_ROOT
        | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _sample(run: RunDir, observed: Seen) -> bool:
    for model, other in connections(ranks_of(run)):
        if model == other:
            observed.within.add(model)
        else:
            observed.joined.add((model, other))
    observed.samples += 1
    return True


def test_no_connection_exists_between_groups(seen: Seen) -> None:
    assert seen.samples > 3
    assert seen.within == set(EXPERTS), "the two ranks of every group are joined"
    assert seen.joined == set()


def test_a_suspended_group_does_not_delay_the_others(seen: Seen, run: RunDir) -> None:
    assert seen.finished_beside == set(EXPERTS) - {STOPPED}
    assert seen.stopped_at < STEPS
    assert read_expert(run.model(STOPPED)).steps == STEPS


def test_the_groups_forest_is_evaluated_and_reported(seen: Seen, run: RunDir) -> None:
    btm_scale("evaluate", run.root, "--launcher", "mpi")
    answer("report", run.root)
    results = json.loads(run.results.read_text())
    assert {f"expert:{name}" for name in EXPERTS} <= set(results["methods"])
    assert run.report.is_file()


def test_a_failing_group_is_reported_and_does_not_stop_the_others(seen: Seen, run: RunDir) -> None:
    """One expert cannot save checkpoints, another is missing: the latter is trained, and mpirun reports the former."""
    for model in ("python", "docs"):
        shutil.rmtree(run.model(model))
    shutil.rmtree(run.checkpoints("python"))
    run.checkpoints("python").write_text("in the way")
    process = _start(run)
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert re.search(r"group 'python' failed: Cannot use .*/checkpoints/.*: Not a directory", output), output
    assert is_finished(run.model("docs")), output
    status = answer("status", run.root)
    assert {model for model, row in status["models"].items() if row["state"] == "failed"} == {"python"}
    assert "in the way" in status["failures"]["python"] or "checkpoints" in status["failures"]["python"]
