"""A run on a real SLURM cluster of four virtual nodes, from text to report, with a requested stop and a lost node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cluster_run import cluster_values
from helpers.held_training import HeldTraining
from helpers.slurm_cluster import SlurmCluster
from helpers.tiny_run import share_text, write_config

from btm_scale.forest.expert import read_expert
from btm_scale.launch.local import free_port
from btm_scale.run_dir import RunDir
from btm_scale.train.progress import ACTIVE

pytestmark = pytest.mark.slow

STEPS, FIRST_CHECKPOINT = 40, 5
EXPERTS = ("python", "docs")
NASTY = 'a "run; rm -rf ~ #'  # the folder's name, which a shell or SLURM must not interpret


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    cluster_of_four = SlurmCluster()
    try:
        cluster_of_four.start()
        yield cluster_of_four
    finally:
        cluster_of_four.stop()


class Submitter:
    """A user at a shell of the cluster."""

    def __init__(self, cluster: SlurmCluster, config: Path, run: RunDir) -> None:
        self.cluster, self.config, self.run = cluster, config, run

    def submit(self) -> dict[str, str]:
        done = self._btm_scale("run", self.config, "--launcher", "slurm", "--out", self.run.root, "--json")
        return dict(json.loads(done)["submitted"])

    def status(self, *options: str) -> dict[str, dict[str, Any]]:
        return dict(json.loads(self._btm_scale("status", self.run.root, "--json", *options))["models"])

    def _btm_scale(self, *arguments: object) -> str:
        done = self.cluster.run(sys.executable, "-m", "btm_scale.cli", *arguments, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def logs(self) -> str:
        paths = [*self.run.root.glob("slurm/*.log"), *self.run.root.glob("train/*/log*")]
        return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


@pytest.fixture(scope="module")
def disturbed(
    cluster: SlurmCluster, real_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Submitter, dict[str, Any]]:
    """A run whose seed LM is asked to stop and one of whose experts loses a node, with observations on the way."""
    folder = tmp_path_factory.mktemp("slurm")
    slurm = {"ranks_per_node": 1, "time": "30"}
    write_config(
        folder / "run.yaml",
        cluster_values(
            real_text,
            steps=STEPS,
            experts=EXPERTS,
            name=NASTY,
            launch={"slurm": slurm},
            checkpoint={"every": FIRST_CHECKPOINT},
        ),
    )
    run = RunDir(folder / NASTY)
    held = HeldTraining(folder, {"seed": FIRST_CHECKPOINT + 1, "python": FIRST_CHECKPOINT + 1})
    cluster.environment |= held.environment
    user = Submitter(cluster, folder / "run.yaml", run)
    seen: dict[str, Any] = {"first": user.submit(), "again": user.submit()}

    def wait_for(condition: Any, seconds: float = 1200) -> None:
        try:
            cluster.wait_for(condition, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{user.logs()}") from None

    def start_soon(job: str) -> None:
        # SLURM would wait two minutes; the nodes reject the job's first credential for a few seconds.
        cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now+8")

    seed = seen["first"]["seed"]
    wait_for(lambda: any(run.checkpoints("seed").glob("step-*")))
    cluster.run("scancel", "--signal=USR1", seed)
    wait_for(lambda: (run.train("seed") / "stopped").is_file())
    held.release("seed")
    seen["stopped"] = int((run.train("seed") / "stopped").read_text())
    wait_for(lambda: cluster.queue().get(seed) == "PENDING")
    start_soon(seed)

    victim = f"{seen['first']['experts']}_0"
    wait_for(lambda: any(run.checkpoints("python").glob("step-*")))
    seen["status"] = user.status()
    node = cluster.run("squeue", "-h", "-j", victim, "-o", "%N").stdout.strip()
    cluster.kill_node(f"n{node.rstrip(']')[-1]}")
    seen["killed at"] = sorted(path.name for path in run.checkpoints("python").glob("step-*"))[-1]
    held.release("python")
    wait_for(lambda: cluster.queue().get(victim) == "PENDING")
    wait_for(lambda: "down" in cluster.run("sinfo", "-h", "-o", "%T").stdout)
    start_soon(victim)
    cluster.start_node(f"n{node.rstrip(']')[-1]}")
    wait_for(lambda: not cluster.queue())
    seen["logs"] = user.logs()
    return user, seen


def test_the_run_goes_from_text_to_report(disturbed: tuple[Submitter, dict[str, Any]]) -> None:
    user, seen = disturbed
    assert user.run.report.is_file(), seen["logs"]
    results = json.loads(user.run.results.read_text())
    assert {"ensemble", "average:posterior", "expert:docs"} <= set(results["methods"])
    assert {row["state"] for row in user.status("--watch").values()} == {"done"}


def test_queued_and_completed_jobs_are_not_submitted_again(disturbed: tuple[Submitter, dict[str, Any]]) -> None:
    user, seen = disturbed
    assert list(seen["first"]) == ["prepare", "seed", "experts", "evaluate"]
    assert seen["again"] == {}
    assert user.submit() == {}


def test_only_missing_work_is_submitted(disturbed: tuple[Submitter, dict[str, Any]]) -> None:
    user, _ = disturbed
    card = user.run.model("docs") / "expert.json"
    text = card.read_text()
    card.unlink()
    try:
        submitted = user.submit()
        assert list(submitted) == ["experts", "evaluate"]
        # Only the task of the missing expert; the evaluation waits for it.
        assert set(user.cluster.queue()) == {
            f"{submitted['experts']}_{EXPERTS.index('docs')}",
            submitted["evaluate"],
        }
        assert "SLURM" in user.status()["docs"]["note"]
    finally:
        user.cluster.run("scancel", *submitted.values())
        card.write_text(text)


def test_status_includes_slurms_queue(disturbed: tuple[Submitter, dict[str, Any]]) -> None:
    _, seen = disturbed
    assert seen["status"]["seed"]["state"] == "done"
    running = seen["status"]["python"]
    assert running["state"] in ACTIVE
    assert running["note"].startswith(f"SLURM {seen['first']['experts']}_0 running on n[")


def test_a_stop_and_a_lost_node_do_not_change_the_weights(
    disturbed: tuple[Submitter, dict[str, Any]], tmp_path: Path
) -> None:
    """Compare seed and expert with the same training by two undisturbed processes."""
    user, seen = disturbed
    assert 0 < seen["stopped"] < STEPS
    assert seen["killed at"] < f"step-{STEPS:08d}"
    undisturbed_run = RunDir(tmp_path / "undisturbed_run")
    share_text(undisturbed_run, user.run)
    for model in ("seed", "python"):
        train_undisturbed(user.config, undisturbed_run, model)
        assert read_expert(undisturbed_run.model(model)).content_hash == read_expert(user.run.model(model)).content_hash
        losses = [json.loads(line)["loss"] for line in undisturbed_run.metrics(model).read_text().splitlines()]
        assert losses == [json.loads(line)["loss"] for line in user.run.metrics(model).read_text().splitlines()]


def test_a_prepare_that_fails_on_the_cluster_is_named_by_status(
    cluster: SlurmCluster, real_text: Path, tmp_path: Path
) -> None:
    for name in EXPERTS:
        shutil.copyfile(real_text / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    with (tmp_path / "docs.jsonl").open("a") as file:
        for number in range(400):  # more than is read before jobs are submitted
            file.write(json.dumps({"text": f"{number} " + "words " * 1000}) + "\n")
        file.write('{"text": "half')
    values = cluster_values(tmp_path, steps=2, experts=EXPERTS, launch={"slurm": {"ranks_per_node": 1, "time": "10"}})
    write_config(tmp_path / "run.yaml", values)
    run = RunDir(tmp_path / "run")
    submitted = Submitter(cluster, tmp_path / "run.yaml", run).submit()
    cluster.wait_for(lambda: submitted["prepare"] not in cluster.queue())
    checked = cluster.run(sys.executable, "-m", "btm_scale.cli", "status", run.root, "--check")
    assert checked.returncode == 1
    assert "prepare failed: " in checked.stdout
    assert "docs.jsonl" in checked.stdout
    assert f"slurm/prepare-{submitted['prepare']}.log" in checked.stdout
    cluster.run("scancel", "--user", str(os.getuid()))


def train_undisturbed(config: Path, run: RunDir, model: str) -> None:
    arguments = ["train", str(config), "--model", model, "--out", str(run.root), "--launcher", "env"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "btm_scale.cli", *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TOKENIZERS_PARALLELISM": "false"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(900) for rank in ranks] == [0, 0]
