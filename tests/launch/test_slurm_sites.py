"""What sites add to SLURM, and what users bring from other jobs: each was reported by users of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.fake_slurm import SBATCH, SCONTROL, config_with, queue_folder, run_job
from helpers.tiny_run import tiny_values, write_config

from btm_scale.cli.options import is_rank
from btm_scale.config.run import RunConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.ranks import IS_RANK
from btm_scale.run.slurm import submit_run
from btm_scale.run.slurm_jobs import write_scripts
from btm_scale.run_dir import RunDir


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return queue_folder(tmp_path, monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for name in ("python", "licences", "docs"):
        rows = [json.dumps({"text": f"text {number} " * 20}) for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return write_config(tmp_path / "run.yaml", tiny_values(tmp_path, baselines={"dense": False}))


def submitted(config: RunConfig, folder: Path) -> dict[str, str]:
    return dict(submit_run(config, RunDir(folder / "run"), dry_run=False)["submitted"])


@pytest.mark.parametrize(
    "answer",
    ['echo "sbatch: lua: your job is billed to lm, 12 hours are left" >&2; echo "$number"', 'echo "$number;cluster-2"'],
    ids=["a note on stderr", "the name of a cluster"],
)
def test_an_id_is_read_whatever_is_said_beside_it(answer: str, queue: Path, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.replace('echo "$number"\n', f"{answer}\n"))
    assert submitted(config, tmp_path) == {"prepare": "1", "seed": "2", "experts": "3", "evaluate": "4"}
    assert "afterok:1 " in (tmp_path / "calls").read_text()
    assert submitted(config, tmp_path) == {}


def test_a_job_that_is_refused_leaves_those_before_it_to_the_next_call(
    queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    refusal = "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    refuse = f"[[ $* != */experts.sh || -e {tmp_path}/grown ]] || {{ echo '{refusal}' >&2; exit 1; }}\n"
    (tmp_path / "bin" / "sbatch").write_text(SBATCH.replace("number=", f"{refuse}number=", 1))
    with pytest.raises(LaunchError, match="jobs that are already submitted are not submitted again"):
        submitted(config, tmp_path)
    assert sorted(job.name for job in queue.iterdir()) == ["1", "2"]
    (tmp_path / "grown").touch()
    assert submitted(config, tmp_path) == {"experts": "3", "evaluate": "4"}


def test_a_config_that_was_edited_on_windows_gives_scripts_that_sbatch_accepts(tmp_path: Path) -> None:
    config = config_with(tmp_path, {"setup": ["module load cuda"], "options": ["--constraint=ib"]})
    text = (tmp_path / "run.yaml").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "run.yaml").write_bytes(text)
    assert RunConfig.load(tmp_path / "run.yaml") == config
    for script in write_scripts(RunConfig.load(tmp_path / "run.yaml"), RunDir(tmp_path / "made")).values():
        assert b"\r" not in script.read_bytes()


# srun refuses more than one of these variables.
ONE_KIND = """#!/bin/bash
env | grep -c ^SLURM_MEM_PER_ >> kinds
"""


@pytest.mark.parametrize(
    ("leaked", "kinds"), [({}, "1"), ({"SLURM_MEM_PER_CPU": "4000"}, "0")], ids=["its own", "another job's too"]
)
def test_the_memory_of_an_interactive_job_does_not_reach_the_steps(
    leaked: dict[str, str], kinds: str, tmp_path: Path
) -> None:
    assert run_job(tmp_path, ONE_KIND, "prepare", SLURM_MEM_PER_NODE="8000", **leaked).returncode == 0
    assert (tmp_path / "kinds").read_text().split() == [kinds]


def test_a_job_that_was_submitted_from_a_task_of_an_array_is_none_of_its_tasks(tmp_path: Path) -> None:
    outer = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    run_job(tmp_path, '#!/bin/bash\necho "$*" >> started\nexit 1\n', **outer)
    assert "--model seed" in (tmp_path / "started").read_text()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def test_ranks_never_meet_at_localhost_because_scontrol_is_missing(tmp_path: Path) -> None:
    absent = "#!/bin/bash\necho 'scontrol: command not found' >&2\nexit 127\n"
    done = run_job(tmp_path, "#!/bin/bash\ntouch started\n", scontrol=absent)
    assert done.returncode != 0
    assert "this job has no nodes" in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("option", ["--mem-per-gpu=40G", "--cpus-per-gpu=8", "--gpu-bind=closest"])
def test_options_per_gpu_are_for_jobs_with_gpus(option: str, tmp_path: Path) -> None:
    config = config_with(tmp_path, {"gres": "gpu:8", "options": [option, "--constraint=ib"]})
    scripts = write_scripts(config, RunDir(tmp_path / "made"))
    with_it = {name for name, script in scripts.items() if f"#SBATCH {option}\n" in script.read_text()}
    assert with_it == {"seed", "dense", "experts", "evaluate"}
    assert "#SBATCH --constraint=ib\n" in scripts["prepare"].read_text()


@pytest.mark.parametrize("job", ["prepare", "seed", "evaluate"])
def test_a_script_needs_no_temporary_folder(job: str, tmp_path: Path) -> None:
    """TMPDIR may be that of the login node, or of a job that has ended."""
    done = run_job(tmp_path, "#!/bin/bash\nexit 85\n", job, TMPDIR="/nowhere/slurm-7")
    assert (tmp_path / "asked").read_text() == "requeue 7\n", done.stderr
    assert "/nowhere" not in done.stderr


def test_a_script_that_is_ended_as_soon_as_it_is_requeued_still_excludes_a_node(tmp_path: Path) -> None:
    for start in ("7-0", "7-1"):
        fault = tmp_path / "made" / "slurm" / "faults" / "node7" / f"{start}.json"
        fault.parent.mkdir(parents=True, exist_ok=True)
        fault.write_text('{"schema": 1, "reason": "GPU is lost"}\n')
    ends = SCONTROL.replace('*) echo "$@" >> asked ;;', '*) echo "$@" >> asked; kill -TERM $PPID ;;')
    run_job(tmp_path, "#!/bin/bash\nexit 1\n", scontrol=ends, slurm={"max_excluded": 4})
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7", "update jobid=7 excnodelist=node7"]


def test_an_interactive_job_is_not_a_group_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IS_RANK, raising=False)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert not is_rank("local")
