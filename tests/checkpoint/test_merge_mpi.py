"""A merge by the ranks of a real mpirun."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import Save, random_weights

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge import merge

RANK = """
import sys
from pathlib import Path
from btm_scale.checkpoint.merge import merge
from btm_scale.checkpoint.mpi import started_by_mpi, world
from btm_scale.errors import CheckpointError
assert started_by_mpi()
output, *inputs = map(Path, sys.argv[1:])
try:
    report = merge(output, [(path, 1.0) for path in inputs], max_shard_bytes=1500, mpi=True)
except CheckpointError as error:
    print(f"told rank {world().rank}: {error}", flush=True)
    sys.exit(2)
print(f"rank {world().rank} of {world().size}: {report.content_hash}", flush=True)
"""


def mpirun(ranks: int, *paths: Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpirun and mpi4py, for example from `pip install mpich mpi4py`")
    rooted = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    command = [found, "-n", str(ranks), sys.executable, "-c", RANK, *map(str, paths)]
    return subprocess.run(
        command, env=os.environ | rooted, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_three_ranks_write_what_one_process_writes(save: Save, tmp_path: Path) -> None:
    models = [save(f"m{i}", random_weights(i)) for i in range(3)]
    alone = merge(tmp_path / "alone", [(model, 1.0) for model in models], max_shard_bytes=1500)
    ran = mpirun(3, tmp_path / "together", *models)
    assert ran.returncode == 0, ran.stderr
    # Found by its form: mpirun may put two ranks' lines on one.
    assert sorted(re.findall(r"rank \d of 3: [0-9a-f]{64}", ran.stdout)) == [
        f"rank {rank} of 3: {alone.content_hash}" for rank in range(3)
    ]
    assert content_hash(tmp_path / "together") == alone.content_hash
    files = sorted(file.name for file in (tmp_path / "alone").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "together").iterdir())
    for file in files:
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "together" / file).read_bytes()


@pytest.mark.slow
def test_all_ranks_end_when_the_plan_has_a_problem(save: Save, tmp_path: Path) -> None:
    ran = mpirun(2, tmp_path / "out", save("m", random_weights(0)), tmp_path / "missing")
    assert ran.returncode != 0
    assert "told rank 0: these models cannot be merged" in ran.stdout
    assert not (tmp_path / "out").exists()
