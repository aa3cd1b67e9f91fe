"""Merging with the ranks of a real mpirun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.mpirun import AS_ROOT, mpirun
from helpers.small_models import Save, random_weights

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.util.mpi import without_mpi


def mpirun_merge(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    rooted = AS_ROOT | {"OMP_NUM_THREADS": "1"}
    command = [mpirun(), "-n", str(ranks), sys.executable, "-m", "btm_scale.cli", "merge", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | rooted, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_three_ranks_write_the_same_files_as_one_process(save: Save, tmp_path: Path) -> None:
    models = [save(f"m{i}", random_weights(i)) for i in range(3)]
    alone = merge(tmp_path / "alone", [(model, 1.0) for model in models], max_shard_bytes=1500)
    ran = mpirun_merge(3, tmp_path / "together", *models, "--max-shard-size", 1500, "--json")
    assert ran.returncode == 0, ran.stderr
    # One JSON document: the other ranks print nothing.
    assert json.loads(ran.stdout)["content_hash"] == alone.content_hash
    assert content_hash(tmp_path / "together") == alone.content_hash
    # Several files, so that every rank wrote at least one.
    files = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert sum(file.endswith(".safetensors") for file in files) >= 3
    assert files == sorted(file.name for file in (tmp_path / "together").iterdir())
    for file in files:
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "together" / file).read_bytes()
    again = mpirun_merge(3, tmp_path / "together", *models, "--max-shard-size", 1500, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["already_complete"] is True


@pytest.mark.slow
def test_all_ranks_exit_if_the_plan_has_a_problem(save: Save, tmp_path: Path) -> None:
    ran = mpirun_merge(2, tmp_path / "out", save("m", random_weights(0)), tmp_path / "missing")
    assert ran.returncode != 0
    assert "Cannot merge these models" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_ranks_of_srun_with_pmix_never_merge_separately(save: Save, tmp_path: Path) -> None:
    """No PMIx server runs here, so MPI cannot start; without MPI, four merges would write one output."""
    model = save("model", random_weights(0))
    command = [sys.executable, "-m", "btm_scale.cli", "merge", tmp_path / "out", model, model]
    outside = without_mpi(os.environ)
    several = {"PMIX_RANK": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    done = subprocess.run(command, env=outside | several, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()
    one = {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}
    subprocess.run(command, env=outside | one, capture_output=True, check=True)
    assert (tmp_path / "out").is_dir()
