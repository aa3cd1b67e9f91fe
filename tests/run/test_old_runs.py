"""Run folders of version 0.1.0 with the current code. See helpers/old_runs.py for how they were created."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.old_runs import DOMAINS, NOVEL, VALUES, losses, unpack
from helpers.warm import Warm

from btm_scale.config.upgrade import with_current_names
from btm_scale.config.yaml import dump_text, load_yaml
from btm_scale.forest.expert import is_finished
from btm_scale.run_dir import RunDir
from btm_scale.util.logs import LEVEL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("old"))


def test_a_finished_run_is_evaluated_to_the_same_perplexities_reported_and_generated_from(
    runs: Path, warm: Warm, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(runs / "finished", run.root)
    before = json.loads(run.results.read_text())
    assert "group" in load_yaml(run.config)
    run.results.unlink()
    run.report.unlink()

    warm.check("evaluate", run.root)
    after = json.loads(run.results.read_text())
    assert set(after["domains"]) == {*DOMAINS, NOVEL}
    assert after["methods"].keys() >= before["methods"].keys()
    for method, numbers in before["methods"].items():
        assert after["methods"][method]["perplexity"] == numbers["perplexity"], method

    warm.check("report", run.root)
    assert "average:posterior" in run.report.read_text()
    generated = warm.check("generate", run.root, "--prompt", "12 + 3", "--max-tokens", "8", "--json")
    assert json.loads(generated.stdout)


def test_a_killed_run_is_resumed_by_a_queued_job_of_that_version_and_finished_by_run(
    runs: Path, warm: Warm, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(runs / "killed", run.root)
    expert = DOMAINS[1]
    assert not is_finished(run.model(expert))
    steps = losses(run.metrics(expert))
    assert 8 < max(steps) < 44

    # The command in the scripts of version 0.1.0, as srun runs it.
    command = ["train", run.config, "--out", run.root, "--model", expert, "--launcher", "slurm"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    slurm = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "btm_scale.cli", *map(str, command)],
        env=os.environ | slurm | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LEVEL: "info"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = re.search(rf"resuming {expert} at step (\d+) of 44", run.log(expert).read_text())
    assert resumed is not None
    assert int(resumed[1]) in range(8, max(steps) + 1, 8)
    for model in ("seed", "dense", *DOMAINS):
        expected = losses(runs / "resumed" / "metrics" / f"{model}.jsonl")
        assert losses(run.metrics(model)) == pytest.approx(expected, abs=1e-5, rel=0)

    values, _ = with_current_names(VALUES | {"text_root": str(runs / "text")})
    (tmp_path / "old.yaml").write_text(dump_text(values))
    warm.check("run", tmp_path / "old.yaml", "--out", run.root)
    assert load_yaml(run.config)["schema"] == 2
    methods, uninterrupted = (
        json.loads(RunDir(root).results.read_text())["methods"] for root in (run.root, runs / "finished")
    )
    for method, numbers in uninterrupted.items():
        assert methods[method]["perplexity"] == pytest.approx(numbers["perplexity"], rel=1e-4), method
