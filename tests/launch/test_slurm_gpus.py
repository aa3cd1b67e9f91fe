"""The GPUs that each job of a run requests from SLURM: one per rank, and none where no rank uses one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.configs import FOLDER
from btm_scale.errors import LaunchError
from btm_scale.launch.slurm import render
from btm_scale.run.slurm_jobs import jobs, write_scripts
from btm_scale.run_dir import RunDir

# Those of a cluster; the others are for a single machine.
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml") if "slurm" in path.read_text())


def options_of(script: str) -> dict[str, str]:
    """The #SBATCH options by name, the last of equal ones as for sbatch."""
    lines = re.findall(r"^#SBATCH (--[\w-]+)(?:[= ](.*))?$", script, re.MULTILINE)
    return dict(lines)


def scripts(folder: Path, slurm: dict[str, Any], *, device: str = "auto", **layout: int) -> dict[str, dict[str, str]]:
    """The options of each job of a small run."""
    launch = {"device": device, "slurm": slurm}
    config = write_config(folder / "run.yaml", tiny_values(folder, layout={"micro_batch": 1} | layout, launch=launch))
    return {name: options_of(path.read_text()) for name, path in write_scripts(config, RunDir(folder / "run")).items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_requests_the_gpus_that_its_ranks_use_and_fills_its_nodes(name: str) -> None:
    config = RunConfig.load(FOLDER / f"{name}.yaml")
    per_node = config.launch.slurm.ranks_per_node
    stages: dict[tuple[str, ...], int] = {}
    for job in jobs(config):
        options = options_of(render(job, config.name, RunDir(Path("/runs/shipped")), config.launch.slurm))
        nodes, ranks = int(options["--nodes"]), int(options["--ntasks-per-node"])
        assert nodes * ranks == job.ranks
        if not job.uses_gpus:
            assert not {"--gres", "--exclusive", "--gpus-per-task"} & options.keys()
            continue
        assert options["--gres"] == f"gpu:{ranks}"
        # A job alone on a node uses all of it. Smaller jobs leave the rest to other jobs, and together fill nodes.
        assert ("--exclusive" in options) == (ranks == per_node)
        if job.models:
            stages[job.after] = stages.get(job.after, 0) + job.ranks * len(job.models)
        elif "--exclusive" not in options:
            assert job.ranks < per_node
    assert len(stages) >= 2
    for gpus in stages.values():
        assert gpus % per_node == 0, stages


def test_there_are_shipped_configs_for_clusters() -> None:
    assert {"paper-125m", "paper-350m", "llama-3.1-8b"} <= set(SHIPPED)


@pytest.mark.parametrize(
    ("gres", "ranks", "requested"),
    [
        ("gpu:8", 2, "gpu:2"),
        ("gpu:h100:8", 4, "gpu:h100:4"),
        ("gpu:h100:8,nvme:1", 2, "gpu:h100:2,nvme:1"),
        ("nvme:1,gpu:8", 8, "nvme:1,gpu:8"),
        ("gpu", 1, "gpu:1"),
        ("gpu:a100", 1, "gpu:a100:1"),
        ("gpu:1g.10gb:7", 1, "gpu:1g.10gb:1"),
        ("gpu:a100:4,gpu:v100:4", 2, "gpu:a100:2"),
        ("nvme:1", 2, "nvme:1"),
    ],
)
def test_a_job_requests_as_many_of_a_nodes_gpus_as_it_has_ranks(
    gres: str, ranks: int, requested: str, tmp_path: Path
) -> None:
    for name, options in scripts(tmp_path, {"gres": gres}, data=ranks).items():
        assert options.get("--gres") == (requested if name != "prepare" else None), name


def test_more_ranks_than_gpus_on_a_node_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"8 ranks per node, and launch\.slurm\.gres is gpu:4.*ranks_per_node to 4"):
        scripts(tmp_path, {"gres": "gpu:4"}, data=8)
    assert scripts(tmp_path, {"gres": "gpu:4", "ranks_per_node": 4}, data=8)["seed"]["--nodes"] == "2"


def test_only_jobs_that_fill_a_node_are_exclusive(tmp_path: Path) -> None:
    slurm = {"gres": "gpu:4", "ranks_per_node": 4, "exclusive": True}
    alone = {name for name, options in scripts(tmp_path, slurm, data=2).items() if "--exclusive" in options}
    assert alone == set()
    alone = {name for name, options in scripts(tmp_path, slurm, data=4).items() if "--exclusive" in options}
    assert alone == {"seed", "dense", "experts", "evaluate"}


def test_jobs_on_the_cpu_request_no_gpu(tmp_path: Path) -> None:
    slurm = {"gres": "gpu:8", "options": ["--gpus-per-node=8", "--mem=0"]}
    for name, options in scripts(tmp_path, slurm, device="cpu", data=2).items():
        assert not {"--gres", "--gpus-per-node"} & options.keys(), name
        assert options["--mem"] == "0"


@pytest.mark.parametrize(
    ("option", "needed"), [("--gpus-per-node=h100:1", "2 ranks per node"), ("-G 3", "4 ranks"), ("--gpus=4", None)]
)
def test_options_request_a_gpu_for_each_rank(option: str, needed: str | None, tmp_path: Path) -> None:
    slurm = {"ranks_per_node": 2, "options": [option]}
    if needed is None:
        scripts(tmp_path, slurm, data=4)
        return
    with pytest.raises(LaunchError, match=f"seed has {needed}, and launch.slurm.options has {option}"):
        scripts(tmp_path, slurm, data=4)


def test_the_job_that_prepares_text_can_have_its_own_options(tmp_path: Path) -> None:
    """Some clusters reject a job without a GPU; others have a partition for such jobs."""
    slurm = {
        "gres": "gpu:8",
        "partition": "gpu",
        "cpus_per_rank": 6,
        "prepare_options": ["--gres=gpu:1", "--partition=long", "--cpus-per-task=32"],
    }
    all_options = scripts(tmp_path, slurm, data=2)
    prepare = all_options.pop("prepare")
    assert [prepare[name] for name in ("--gres", "--partition", "--cpus-per-task")] == ["gpu:1", "long", "32"]
    for options in all_options.values():
        assert [options[name] for name in ("--gres", "--partition", "--cpus-per-task")] == ["gpu:2", "gpu", "6"]
