"""A SLURM cluster at its worst: bound cores, taken ports, banners, strange names, small arrays and no room."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from helpers.slurm_cluster import SlurmCluster
from helpers.text_samples import prose_texts, write_jsonl
from helpers.tiny_run import tiny_values, write_config

from btm_scale.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.full]

EXPERTS = tuple(f"d{number}" for number in range(8))
BANNER = '#!/bin/sh\necho "  Welcome, this is a cluster of 4 nodes"\necho 2026\nexec {sbatch} "$@"\n'


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Nodes of two cores to which steps are bound, small arrays, and an sbatch that prints a banner."""
    cluster = SlurmCluster(cores=2, settings="TaskPlugin=task/affinity\nMaxArraySize=3\nJobSubmitPlugins=lua")
    programs = cluster.folder / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(BANNER.format(sbatch=shutil.which("sbatch", path=cluster.environment["PATH"])))
    (programs / "sbatch").chmod(0o755)
    cluster.environment["PATH"] = f"{programs}:{cluster.environment['PATH']}"
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_eight_experts_are_trained_on_a_cluster_at_its_worst(cluster: SlurmCluster, tmp_path: Path) -> None:
    texts = prose_texts(900)
    for number, name in enumerate(EXPERTS):
        write_jsonl(tmp_path / f"{name}.jsonl", texts[number * 100 : number * 100 + 100])
    values = tiny_values(
        tmp_path,
        model={"family": "llama", "layers": 1, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 24},
        tokenizer={"vocab_size": 400},
        domains={name: {"text": f"{name}.jsonl"} for name in EXPERTS},
        novel_domains={},
        budget={"tokens": 9 * 512 * 2, "seed_share": 1 / 9, "sequence_length": 32, "batch_tokens": 512},
        layout={"precision": "fp32", "micro_batch": 16},
        baselines={"dense": False},
        evaluate={"tokens_per_domain": 300, "dev_blocks": 3, "averages": ["uniform"]},
        launch={"slurm": {"ranks_per_node": 1, "cpus_per_rank": 2, "time": "10"}},
    )
    write_config(tmp_path / "run.yaml", values)
    run, said = RunDir(tmp_path / "run"), tmp_path / "said"
    with ExitStack() as stack:
        for number in range(20_000, 20_200, 7):  # where groups of the first jobs would rendezvous
            for port in (number, number + 1):
                stack.enter_context(closing(_listening(port)))
        cluster.run("sbatch", "-o", "/dev/null", "-J", "two\nlines", "--wrap", "sleep 600")
        cluster.full.touch()
        # As users do who work in an interactive job, bound to one core.
        inside = ("srun", "--cpu-bind=verbose,cores", "-n1", "-c1", "--overlap", "--mem=0")
        words = (*inside, sys.executable, "-m", "btm_scale.cli", "run", tmp_path / "run.yaml", "--out", run.root)
        with said.open("w") as log:
            process = subprocess.Popen(
                [str(word) for word in (*words, "--launcher", "slurm")],
                env=cluster.environment,
                stdout=log,
                stderr=log,
            )
        stack.callback(process.kill)
        cluster.wait_for(lambda: "accepts no more jobs" in said.read_text() or process.poll() is not None)
        cluster.full.unlink()
        assert process.wait(120) == 0, said.read_text()
        assert "accepts no more jobs of this user for now (Job violates" in said.read_text()
        arrays = [path.stem for path in sorted((run.root / "slurm").glob("experts-*.sh"))]
        assert arrays == ["experts-0", "experts-1", "experts-2"]
        cluster.run("scancel", "--name", "two\nlines")
        cluster.wait_for(lambda: not cluster.queue(), 400)
    assert run.report.is_file(), _logs(run)
    assert set(EXPERTS) <= {path.parent.name for path in run.experts.glob("*/expert.json")}
    ids = [one["id"] for one in json.loads((run.root / "slurm" / "jobs.json").read_text())["submissions"]]
    assert len(ids) == len(set(ids)) == 6
    checked = cluster.run(sys.executable, "-m", "btm_scale.cli", "status", run.root, "--check", "--json")
    assert checked.returncode == 0, checked.stdout
    assert json.loads(checked.stdout)["problems"] == []


def _logs(run: RunDir) -> str:
    return "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in run.root.glob("slurm/*.log"))


def _listening(port: int) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", port))
    listener.listen()
    return listener
