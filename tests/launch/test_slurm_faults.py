"""Nodes that fail groups: what counts as a fault, what is excluded, and how the scripts of jobs act on it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from helpers.fake_slurm import run_job

from btm_scale.errors import LaunchError, NoUsableGpuError
from btm_scale.launch.slurm_faults import NodeFault, faulty_nodes, is_of_the_host, nodes_to_exclude, noting_faults
from btm_scale.run_dir import RunDir

JOB = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n3", "SLURM_RESTART_COUNT": "1"}
ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError(ECC), True),
        (RuntimeError("CUDA error: no CUDA-capable device is detected"), True),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), True),
        (RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled cuda error, NCCL version 2.21.5"), True),
        (RuntimeError("NCCL error: ncclRemoteError: A call failed possibly due to a remote process exiting"), False),
        (RuntimeError("unhandled system error: Connect to 10.0.0.7<41234> failed : Connection refused"), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (NoUsableGpuError("SLURM gave this job GPUs, and torch can use none"), True),
        (LaunchError("precision fp16 is not supported"), False),
    ],
)
def test_only_errors_of_hardware_and_driver_are_faults_of_a_node(error: Exception, fault: bool) -> None:
    assert is_of_the_host(error) == fault


def fail(run: RunDir, node: str, job: str, error: str = ECC) -> None:
    with pytest.raises(RuntimeError), noting_faults(run, JOB | {"SLURMD_NODENAME": node, "SLURM_JOB_ID": job}):
        raise RuntimeError(error)


def test_a_fault_is_recorded_once_per_start_and_only_in_a_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for _ in range(2):  # two ranks of the same node
        fail(run, "n3", "7")
    with pytest.raises(RuntimeError), noting_faults(run, {"SLURMD_NODENAME": "n3"}):
        raise RuntimeError(ECC)
    fail(run, "n3", "8", "a mistake of ours")
    fail(run, "../n4", "7")
    [node] = faulty_nodes(run)
    assert (node.name, node.faults, node.is_bad) == ("n3", 1, False)
    assert NodeFault.load(tmp_path / "slurm" / "faults" / "n3" / "7-1.json").reason == ECC.splitlines()[0]


@pytest.fixture
def partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with 8 nodes in the default partition, and 40 in another."""
    rows = [f"n{number} gpu*" for number in range(8)] + [f"c{number} cpu" for number in range(40)]
    (tmp_path / "bin").mkdir()
    sinfo = tmp_path / "bin" / "sinfo"
    sinfo.write_text("#!/bin/bash\ncat <<'END'\n" + "\n".join(rows) + "\nEND\n")
    sinfo.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


@pytest.mark.usefixtures("partition")
@pytest.mark.parametrize(
    ("most", "needed", "excluded", "room"),
    [(4, 1, ["n3", "n1"], 0), (1, 1, ["n3"], 0), (0, 1, [], 0), (4, 7, ["n3"], 0), (4, 8, [], 0)],
    ids=["a quarter", "max_excluded", "none", "the largest job", "a job of all nodes"],
)
def test_few_nodes_are_excluded_however_many_fail(
    most: int, needed: int, excluded: list[str], room: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir(tmp_path)
    for node, faults in (("n3", 3), ("n1", 2), ("n2", 2), ("n0", 1)):
        for job in range(faults):
            fail(run, node, str(job))
    with caplog.at_level(logging.WARNING):
        bad, left = nodes_to_exclude(run, most, None, needed)
    assert ([node.name for node in bad], left) == (excluded, room)
    assert caplog.text.count("new jobs exclude ") == len(excluded)
    assert ("check whether the config or the environment is what fails there" in caplog.text) == (most > 0)


@pytest.mark.usefixtures("partition")
def test_what_the_limit_leaves_is_for_requeued_jobs(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert nodes_to_exclude(run, 4, None, 1) == ([], 2)
    assert nodes_to_exclude(run, 4, "named", 1) == ([], 4)  # all rows are of the partition that is asked for
    for job in "12":
        fail(run, "n3", job)
    bad, room = nodes_to_exclude(run, 4, None, 1)
    assert ([str(node) for node in bad], room) == ([f"n3 failed 2 groups (last: {ECC.splitlines()[0]})"], 1)


FAILS = """#!/bin/bash
mkdir -p made/slurm/faults/node7
echo '{"schema": 1, "reason": "no GPU"}' > "made/slurm/faults/node7/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.json"
mkdir -p made/train/seed; echo '{"mistake": true}' > made/train/seed/log.failed-0.json
exit 2
"""


def asked(folder: Path) -> list[str]:
    path = folder / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_a_job_is_requeued_without_the_node_that_failed_it_twice(tmp_path: Path) -> None:
    """A GPU that is gone looks like a mistake of the user, but not to a job of SLURM."""
    slurm = {"exclude": "n[01-02]"}
    assert run_job(tmp_path, FAILS, slurm=slurm).returncode == 2
    assert asked(tmp_path) == ["requeue 7"]
    run_job(tmp_path, FAILS, slurm=slurm, SLURM_RESTART_COUNT="1")
    assert asked(tmp_path)[1:] == ["requeue 7", "update jobid=7 excnodelist=n[01-02],node7"]
    (tmp_path / "asked").unlink()
    run_job(tmp_path, FAILS, slurm=slurm | {"max_excluded": 0}, SLURM_RESTART_COUNT="2")
    assert asked(tmp_path) == ["requeue 7"]


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    """The id of the last task of an array is that of the array."""
    run_job(tmp_path, "#!/bin/bash\nexit 1\n", "experts", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1")
    assert asked(tmp_path) == ["requeue 7_1"]


def test_a_cluster_that_does_not_requeue_is_reported(tmp_path: Path) -> None:
    refuses = '#!/bin/bash\n[[ "$1" != requeue ]] || exit 1\n[[ "$2" != hostnames ]] || echo node7\n'
    done = run_job(tmp_path, "#!/bin/bash\nexit 1\n", scontrol=refuses)
    assert done.returncode == 1
    assert "SLURM does not requeue this job: repeat the command that submitted it" in done.stderr


NODES = """#!/bin/bash
case "$1 $2 $4" in
"show hostnames "*) printf 'node7\\nnode8\\n' ;;
"show node node8") echo "NodeName=node8 State={state} BootTime={start} SlurmdStartTime={start}" ;;
"show node "*) echo "NodeName=node7 NodeAddr=127.0.0.1 State=IDLE SlurmdStartTime=2020-01-01T00:00:00" ;;
*) echo "$@" >> asked ;;
esac
"""


@pytest.mark.parametrize(
    ("state", "start", "reason"),
    [
        ("DOWN+NOT_RESPONDING", None, "down"),
        ("IDLE", 60, "started again"),
        ("IDLE", -(10**8), None),
    ],
    ids=["down", "started again", "preempted"],
)
def test_a_node_that_was_lost_is_noted_by_the_next_start_of_the_job(
    state: str, start: int | None, reason: str | None, tmp_path: Path
) -> None:
    """SLURM kills the script with the node, so that only the next start can tell. `start` is in seconds from now."""
    when = "Unknown" if start is None else time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + start))
    nodes = NODES.replace("{state}", state).replace("{start}", when)
    folder = tmp_path / "made" / "train" / "seed"
    folder.mkdir(parents=True)
    (folder / "nodes").write_text("7-0\nnode7\nnode8\n")
    done = run_job(tmp_path, "#!/bin/bash\n", scontrol=nodes, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    found = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "made/slurm").glob("faults/*/7-0.*")
    }
    assert found == ({"node8": {"schema": 1, "reason": f"the node was lost ({reason})"}} if reason else {})
    assert not (folder / "nodes").exists()
    assert [node.name for node in faulty_nodes(RunDir(tmp_path / "made"))] == ["node8"] * bool(reason)


def test_nodes_of_an_earlier_job_say_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "train" / "seed"
    folder.mkdir(parents=True)
    (folder / "nodes").write_text("6-0\nnode8\n")
    nodes = NODES.replace("{state}", "DOWN").replace("{start}", "Unknown")
    run_job(tmp_path, "#!/bin/bash\n", scontrol=nodes, SLURM_RESTART_COUNT="1")
    assert not (tmp_path / "made" / "slurm" / "faults").exists()
    assert not any(folder.iterdir())
