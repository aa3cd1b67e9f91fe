"""Ranks that torchrun starts: its agent listens at MASTER_PORT itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cluster_run import cluster_values
from helpers.in_process import answer
from helpers.tiny_run import write_config

from btm_scale.forest.expert import read_expert
from btm_scale.run_dir import RunDir

pytestmark = [pytest.mark.slow, pytest.mark.full]


def test_a_group_of_torchruns_ranks_trains_a_model(real_text: Path, tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", cluster_values(real_text, steps=3, experts=("python", "docs")))
    run = RunDir(tmp_path / "run")
    answer("prepare", tmp_path / "run.yaml", "--out", run.root)
    words = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "btm_scale.cli")
    command = ("train", tmp_path / "run.yaml", "--out", run.root, "--model", "seed", "--launcher", "env")
    done = subprocess.run(
        [sys.executable, *map(str, (*words, *command))],
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr + run.log("seed").read_text()
    assert read_expert(run.model("seed")).steps == 3
