"""What is submitted when SLURM, or the way to it, is not at its best; sbatch and squeue are stand-ins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.fake_slurm import SQUEUE, queue_folder
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.launch import SlurmConfig
from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, GroupFailed, LaunchError
from btm_scale.launch import slurm_commands
from btm_scale.launch.slurm import SrunPool
from btm_scale.launch.slurm_commands import QueueEntry
from btm_scale.launch.slurm_environment import for_jobs
from btm_scale.launch.supervise import GroupCommand
from btm_scale.run import slurm
from btm_scale.run.slurm import submit_run
from btm_scale.run_dir import RunDir

EXPERTS = ("python", "licences")

NO_ROOM = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting"
)
PERHAPS_NO_ROOM = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
    "and/or time limits)"
)


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the queue that sbatch and squeue know."""
    return queue_folder(tmp_path, monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for name in ("python", "licences", "docs"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"text {i} " * 20}) + "\n" for i in range(60))
        )
    return write_config(tmp_path / "run.yaml", tiny_values(tmp_path, baselines={"dense": False}))


def submitted(config: RunConfig, folder: Path) -> dict[str, str]:
    return dict(submit_run(config, RunDir(folder / "run"), dry_run=False)["submitted"])


@pytest.mark.parametrize(("name", "value"), [("SQUEUE_STATES", "RUNNING"), ("USER", "another"), ("LOGNAME", "another")])
def test_variables_of_the_user_do_not_hide_queued_jobs(
    name: str, value: str, queue: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert list(submitted(config, tmp_path)) == ["prepare", "seed", "experts", "evaluate"]
    assert submitted(config, tmp_path) == {}


@pytest.mark.parametrize("answered", [0, 2], ids=["of a job", "of an array"])
def test_a_job_whose_answer_was_lost_is_not_submitted_again(
    answered: int, queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "deaf").touch()
    for call in range(answered + 1):
        with pytest.raises(LaunchError, match="Socket timed out"):
            submitted(config, tmp_path)
        assert len(list(queue.iterdir())) == call + 1
    (tmp_path / "deaf").unlink()
    assert list(submitted(config, tmp_path)) == ["prepare", "seed", "experts", "evaluate"][answered + 1 :]
    assert len(list(queue.iterdir())) == 4
    assert submitted(config, tmp_path) == {}


def test_a_job_that_will_never_start_is_not_in_progress(queue: Path, config: RunConfig, tmp_path: Path) -> None:
    first = submitted(config, tmp_path)
    (queue / first["seed"]).write_text("")  # it has failed, and those that wait for it are not yet taken out
    for name in ("experts", "evaluate"):
        job = queue / first[name]
        job.write_text(job.read_text().replace("|Dependency|", "|DependencyNeverSatisfied|"))
    assert list(submitted(config, tmp_path)) == ["seed", "experts", "evaluate"]


def test_a_queue_that_does_not_answer_is_reported_in_a_line_with_its_remedy(
    queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    answers = "squeue: error: resolve_ctls_from_dns_srv: Unknown host\nsqueue: fatal: no configuration source"
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/bash\necho '{answers}' >&2; exit 1\n")
    with pytest.raises(LaunchError) as raised:
        submitted(config, tmp_path)
    assert str(raised.value) == (
        "squeue failed: error: resolve_ctls_from_dns_srv: Unknown host. No job was submitted. Check that this host can "
        "reach SLURM (SLURM_CONF), or only write the scripts: --dry-run."
    )
    assert not any(queue.iterdir())


def test_a_controller_that_is_busy_is_asked_again(
    queue: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    busy = "squeue: error: slurm_load_jobs error: Socket timed out on send/recv operation"
    squeue.write_text(
        SQUEUE.replace("[[ $*", f"rm {queue}/../busy 2> /dev/null && {{ echo '{busy}' >&2; exit 1; }}\n[[ $*")
    )
    monkeypatch.setattr(slurm_commands.time, "sleep", lambda seconds: None)
    (tmp_path / "busy").touch()
    assert len(submitted(config, tmp_path)) == 4
    squeue.write_text(f"#!/bin/bash\necho '{busy}' >&2; exit 1\n")
    with pytest.raises(slurm_commands.SlurmBusy, match="Socket timed out"):
        submitted(config, tmp_path)


def test_a_refusal_for_lack_of_nodes_says_which_there_are(queue: Path, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("0\n")
    (tmp_path / "refusal").write_text(
        "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    )
    (tmp_path / "bin" / "sinfo").write_text(
        "#!/bin/bash\n[[ $* != *%R* ]] || printf 'gpu|3|gpu:4|48\\ncpu|9|(null)|64\\n'\n"
    )
    (tmp_path / "bin" / "sinfo").chmod(0o755)
    with pytest.raises(
        LaunchError, match=r"gpu: 3 with gpu:4 and 48 cores; cpu: 9 with no GPU and 64 cores\. All nodes"
    ):
        submitted(config, tmp_path)


def test_a_corrected_config_is_accepted_once_no_job_of_the_first_is_queued(
    queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    submitted(config, tmp_path)
    corrected = config.model_copy(update={"random_seed": 4})
    with pytest.raises(ConfigError, match="holds a run with a different config"):
        submitted(corrected, tmp_path)
    for job in queue.iterdir():
        job.unlink()
    assert "prepare" in submitted(corrected, tmp_path)


def test_the_id_of_a_job_is_found_among_the_lines_that_a_site_prints(
    queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "banner").write_text("  Welcome to the cluster\nquota: 12 of 100 GB\n")
    assert submitted(config, tmp_path) == {"prepare": "1", "seed": "2", "experts": "3", "evaluate": "4"}
    (tmp_path / "banner").write_text("12\n")  # could be an id: the queue has the right one
    for job in queue.iterdir():
        job.write_text("")
    assert submitted(config, tmp_path) == {"prepare": "5", "seed": "6", "experts": "7", "evaluate": "8"}


@pytest.mark.parametrize("name", ["two\\nlines", "a,b;c 1_2 PENDING", "\\xff\\xfe"])
def test_other_jobs_may_have_any_name(name: str, queue: Path, config: RunConfig, tmp_path: Path) -> None:
    (queue / "other").write_text(f"77|RUNNING|None|n1|{name}|/other/{name}.sh a\\nb\n")
    assert len(submitted(config, tmp_path)) == 4
    assert submitted(config, tmp_path) == {}


def test_arrays_stay_below_the_clusters_size(queue: Path, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "max").write_text("1\n")
    made = submitted(config, tmp_path)
    assert list(made) == ["prepare", "seed", "experts-0", "experts-1", "evaluate"]
    places = [line.split("|")[0] for name in ("experts-0", "experts-1") for line in _lines(queue / made[name])]
    assert places == ["3_0", "4_0"]
    (tmp_path / "max").unlink()  # with one array now, the models are still known as queued
    assert submitted(config, tmp_path) == {}


@pytest.mark.parametrize(
    ("most", "waits", "limits"), [(1, [False, True], ["%1", "%1"]), (3, [False, False], ["%2", "%1"])]
)
def test_arrays_share_the_experts_that_may_train_at_once(
    most: int, waits: list[bool], limits: list[str], queue: Path, config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "max").write_text("1\n")
    slurm_section = config.launch.slurm.model_copy(update={"at_a_time": most})
    launch = config.launch.model_copy(update={"slurm": slurm_section})
    submitted(config.model_copy(update={"launch": launch}), tmp_path)
    calls = [line for line in _lines(tmp_path / "calls") if "--array" in line]
    assert ["afterok:2,afterany:3" in call for call in calls] == waits
    assert [call.partition("--array=0")[2][:2] for call in calls] == limits


def test_the_tasks_of_an_array_are_named_by_ranges() -> None:
    assert slurm_commands.ranges([0, 1, 2, 4, 6, 7]) == "0-2,4,6-7"


def test_jobs_that_find_no_room_are_submitted_in_parts_once_others_have_ended(
    queue: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs fit at once; each wait ends the oldest job, whose models are finished then."""
    (tmp_path / "limit").write_text("2\n")
    (tmp_path / "refusal").write_text(NO_ROOM)
    done: set[str] = set()
    ended: list[str] = []
    monkeypatch.setattr(slurm, "is_done", lambda config, run, model: model in done)
    monkeypatch.setattr(slurm, "is_prepared", lambda config, run, domains: "prepare" in done)

    def end_oldest(seconds: float) -> None:
        job, line = next((job, line) for job in sorted(queue.iterdir()) for line in _lines(job))
        job.write_text("".join(f"{other}\n" for other in _lines(job) if other != line))
        kind = line.split("|")[4].rpartition(".")[2]
        ended.append(kind)
        done.add(EXPERTS[int(line.split("|")[0].partition("_")[2])] if kind == "experts" else kind)

    monkeypatch.setattr(slurm.time, "sleep", end_oldest)
    assert list(submitted(config, tmp_path)) == ["prepare", "seed", "experts", "evaluate"]
    assert ended == ["prepare", "seed", "experts"]


def test_what_depends_on_a_job_that_failed_meanwhile_is_not_submitted(
    queue: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text("1\n")
    (tmp_path / "refusal").write_text(NO_ROOM)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: (queue / "1").write_text(""))
    with pytest.raises(GroupFailed, match=r": prepare\. What .* not submitted: seed, experts, evaluate\."):
        submitted(config, tmp_path)
    assert [job.name for job in queue.iterdir()] == ["1"]


def test_a_job_that_can_never_be_accepted_is_not_waited_for(queue: Path, config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "limit").write_text("0\n")
    (tmp_path / "refusal").write_text(PERHAPS_NO_ROOM)
    with pytest.raises(LaunchError, match="SLURM accepts no job of this user, although none is queued"):
        submitted(config, tmp_path)
    (tmp_path / "refusal").write_text("sbatch: error: QOSMaxWallDurationPerJobLimit\n" + PERHAPS_NO_ROOM)
    with pytest.raises(LaunchError, match=r"QOSMaxWallDurationPerJobLimit(.|\n)*Correct launch\.slurm"):
        submitted(config, tmp_path)


OUTER = {
    "SLURM_JOB_ID": "7",
    "SLURM_CPU_BIND": "mask_cpu:0x2",
    "SLURM_MEM_PER_NODE": "100",
    "SLURM_EXPORT_ENV": "NONE",
    "SRUN_CPUS_PER_TASK": "1",
    "SBATCH_PARTITION": "debug",
    "RANK": "3",
    "MASTER_ADDR": "elsewhere",
    "TORCHELASTIC_RUN_ID": "x",
    "PMI_RANK": "3",
    "CUDA_VISIBLE_DEVICES": "",
    "BTM_SCALE_SUPERVISOR": "1",
}


def test_jobs_get_the_users_environment_and_nothing_of_an_outer_job() -> None:
    kept = {"PATH": "/bin", "HF_HOME": "/cache", "SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "b"}
    assert for_jobs(kept | OUTER) == kept
    # Outside a job, the user has chosen the GPUs.
    assert for_jobs(kept | {"CUDA_VISIBLE_DEVICES": "1"}) == kept | {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_group_started_within_a_step_is_not_bound_to_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LaunchError, match="This process is not in a SLURM job"):
        SrunPool(SlurmConfig())
    for name, value in (OUTER | {"SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR")
    start = SrunPool(SlurmConfig(cpus_per_rank=6)).take(GroupCommand("score", 2, ("score", "run"), Path("log")))
    assert start is not None
    assert {"--ntasks=2", "--overlap", "--cpus-per-task=6"} <= set(start.processes[0])
    assert start.only
    assert not {"SLURM_CPU_BIND", "SLURM_EXPORT_ENV", "RANK"} & set(start.environment)
    assert start.environment["SLURM_JOB_ID"] == "7"
    assert start.environment["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("reason", "blocked"),
    [
        ("Priority", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("Dependency", False),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocGrpCPUMinutesLimit", True),
        ("PartitionTimeLimit", True),
        ("BadConstraints", True),
        ("JobHeldUser", True),
        ("launch failed requeued held", True),
        ("Reservation", False),
        ("ReservationDeleted", True),
    ],
)
def test_a_job_that_waits_for_no_other_is_blocked(reason: str, blocked: bool) -> None:
    assert QueueEntry("1", "PENDING", reason, "", "").is_blocked == blocked
    assert not QueueEntry("1", "RUNNING", reason, "n1", "").is_blocked


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
