from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_run import btm_scale

from btm_scale.report.doctor_table import print_doctor
from btm_scale.run import doctor
from btm_scale.run.doctor.ask import Reply, ask
from btm_scale.run.doctor.finding import Finding
from btm_scale.run.doctor.libraries import library_findings
from btm_scale.run.doctor.machine import machine_findings, memory_limit
from btm_scale.run.doctor.programs import mpi_family, program_findings
from btm_scale.util.cores import cpu_quota
from btm_scale.util.device_query import VISIBLE

A_GPU = {"name": "NVIDIA H100", "memory": 85_000_000_000, "capability": "9.0", "error": ""}
ANSWERS: dict[str, dict[str, Any]] = {
    "torch": {"build": "CUDA 12.8", "nccl": "2.27.3"},
    "gpus": {"gpus": [A_GPU], "reason": ""},
    "deepspeed": {},
    "precision": {"device": "NVIDIA H100", "possible": ["bf16", "fp16", "fp32"], "fast": "bf16"},
    "triton": {"assembler": "/triton/ptxas", "has_assembler": True},
    "mpi4py": {"library": "MPICH Version: 5.0.2"},
}
Examine = Callable[..., dict[str, Any]]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Examine:
    """Return the report for a machine with these library answers and driver GPUs."""
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)

    def examine(of_driver: tuple[str, ...] = (), **answers: dict[str, Any]) -> dict[str, Any]:
        replies = {name: Reply(answer) for name, answer in (ANSWERS | answers).items()}
        monkeypatch.setattr(doctor, "ask", lambda *_: replies)
        monkeypatch.setattr(doctor, "gpus_of_driver", lambda: list(of_driver))
        return doctor.examine(tmp_path)

    return examine


def finding(report: dict[str, Any], name: str) -> dict[str, str]:
    [found] = [found for found in report["findings"] if found["name"] == name]
    return found


def verdict(report: dict[str, Any], name: str) -> tuple[bool, str]:
    [found] = [(found["works"], found["note"]) for found in report["verdicts"] if found["name"] == name]
    return found


@pytest.mark.slow
def test_this_machine_can_train_and_merge_by_the_json_report() -> None:
    import torch

    report = json.loads(btm_scale("doctor", "--json").stdout)
    assert report["works"]
    assert verdict(report, "train on CPU") == (True, "")
    assert verdict(report, "train on GPU") == (False, "no GPU")
    assert verdict(report, "merge and convert") == (True, "")
    assert torch.__version__ in finding(report, "torch")["found"]
    assert "2.11 is required" in finding(report, "torch")["found"]
    assert finding(report, "precision")["found"].startswith("bf16")
    for name in ("Python", "deepspeed", "megatron-core", "transformers"):
        assert finding(report, name)["state"] == "ok"


def test_a_broken_torch_is_reported_with_exit_code_1_and_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = btm_scale("doctor", check=False)
    assert done.returncode == 1
    assert "OSError: libcudart.so.99: cannot open shared object file" in done.stdout
    assert str(tmp_path / "torch" / "__init__.py") in done.stdout
    lines = {line.split("  ")[1]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert "unchecked" in lines["megatron-core"]
    assert "torch does not work" in lines["megatron-core"]
    for name in ("train on CPU", "merge and convert"):
        assert lines[name].endswith("  torch is broken")
    assert "Traceback" not in done.stdout + done.stderr


def test_other_libraries_are_checked_if_one_crashes_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing.py").write_text("import os; os.abort()")
    (tmp_path / "leaving.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "hanging.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    replies = ask(["crashing", "leaving", "json", "hanging", "csv"], seconds=6)
    assert replies["crashing"].error.startswith("the process was killed by SIGABRT")
    assert replies["leaving"].error == "SystemExit: 3"
    assert replies["json"].error == ""
    assert replies["hanging"].error.startswith("no answer in time")
    assert (replies["csv"].state, replies["csv"].error) == ("unchecked", "not checked within 6 s")


def test_missing_programs_are_reported_with_what_they_are_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    findings = {one.name: one for one in program_findings()}
    assert {name for name, one in findings.items() if one.state == "missing"} == set(findings) - {"Python.h"}
    print_doctor({"findings": [vars(one) for one in findings.values()], "verdicts": []})
    rows = re.split(r"\n(?=  \S|\S)", capsys.readouterr().out)  # a row's other lines are indented further
    lines = {row.split()[0]: " ".join(row.split()) for row in rows if row.strip()}
    assert "missing" in lines["mpirun"]
    assert "needed for --launcher mpi and mpirun btm-scale merge: pip install mpich" in lines["mpirun"]
    assert "no sbatch, srun, squeue, scancel; needed for --launcher slurm" in lines["SLURM"]


def test_slurm_without_a_controller_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sbatch", "srun", "squeue", "scancel", "sinfo"):
        answer = "echo unable to contact controller >&2; exit 1" if name == "sinfo" else "echo slurm 24.05.2"
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    [broken] = [one for one in program_findings() if one.name == "SLURM"]
    assert (broken.state, broken.found.split(": ", 1)[1]) == ("broken", "unable to contact controller")
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho gpu\necho debug\n")
    [found] = [one for one in program_findings() if one.name == "SLURM"]
    assert (found.state, found.found) == ("ok", "slurm 24.05.2; partitions debug, gpu")


def test_gpus_are_listed_and_one_that_cannot_compute_is_named(examined: Examine) -> None:
    failing = A_GPU | {"error": "AcceleratorError: CUDA error: uncorrectable ECC error"}
    report = examined(gpus={"gpus": [failing, A_GPU], "reason": ""})
    assert finding(report, "GPU 1")["found"] == "NVIDIA H100, 85.0 GB, compute capability 9.0"
    assert finding(report, "GPU 0")["state"] == "broken"
    assert "uncorrectable ECC error" in finding(report, "GPU 0")["found"]
    assert finding(report, "NCCL")["found"] == "2.27.3"
    assert verdict(report, "train on GPU") == (True, "1 of 2")


def test_gpus_that_a_cpu_build_of_torch_cannot_use_are_named(examined: Examine) -> None:
    report = examined(("NVIDIA A100, 570.86.15",), torch={"build": "CPU", "nccl": ""}, gpus={"gpus": [], "reason": ""})
    assert finding(report, "GPU")["found"] == "NVIDIA A100, 570.86.15: this is a CPU build of torch"
    assert verdict(report, "train on GPU") == (False, "the GPU cannot be used")
    assert verdict(report, "train on CPU") == (True, "")
    assert report["works"]


@pytest.mark.parametrize(
    ("visible", "state", "words"),
    [
        ("", "missing", "hidden by CUDA_VISIBLE_DEVICES='': NVIDIA A100"),
        ("NoDevFiles", "broken", "NVIDIA A100: CUDA_VISIBLE_DEVICES=NoDevFiles names none"),
        (None, "broken", "NVIDIA A100: torch (CUDA 12.8) reports: The driver is too old (found version 11040)"),
    ],
)
def test_gpus_that_torch_does_not_see_are_reported_with_the_reason(
    visible: str | None, state: str, words: str, examined: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    too_old = "The driver is too old (found version 11040)."
    report = examined(("NVIDIA A100",), gpus={"gpus": [], "reason": too_old})
    assert (finding(report, "GPU")["state"], finding(report, "GPU")["found"]) == (state, words)


def test_a_triton_without_its_assembler_compiles_no_kernels(examined: Examine) -> None:
    report = examined(triton={"assembler": "/triton/ptxas", "has_assembler": False})
    works, note = verdict(report, "Triton kernels")
    assert not works
    assert "ptxas is missing" in note


def test_an_mpirun_of_another_mpi_than_mpi4pys_does_not_work(
    examined: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Finding("programs", "mpirun", "ok", "mpirun (Open MPI) 4.1.4 at /usr/bin/mpirun")
    findings = [other if one.name == "mpirun" else one for one in program_findings()]
    monkeypatch.setattr(doctor, "program_findings", lambda: findings)
    works, note = verdict(examined(), "--launcher mpi")
    assert not works
    assert note == "mpi4py uses MPICH, but mpirun is Open MPI's: ranks would run alone"
    assert verdict(examined(mpi4py={"library": "Open MPI v4.1.4"}), "--launcher mpi") == (True, "")


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("mpirun (Open MPI) 4.1.4", "Open MPI"),
        ("prterun (PRRTE) 3.0.5", "Open MPI"),
        ("HYDRA build details:\n Version: 4.2", "MPICH"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9", "MPICH"),
        ("MVAPICH Version: 3.0", "MPICH"),
        ("Platform MPI 9", None),
    ],
)
def test_an_mpi_is_recognized_by_its_version(text: str, family: str | None) -> None:
    assert mpi_family(text) == family


def test_a_version_below_the_required_one_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["numpy>=99.1", 'lm_eval>=0.0.1; extra == "lm-eval"', 'numpy>=100; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    findings = {one.name: one for one in library_findings({})}
    assert findings["numpy"].state == "old"
    assert "99.1 or later is required" in findings["numpy"].found
    assert findings["lm_eval"].state == "ok"


@pytest.mark.parametrize(
    ("mounts", "files"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000", "memory.max": "7000"}),
        (
            "4:cpu,cpuacct:/not-mounted-here\n3:memory:/job\n0::/",
            {
                "cpu/cpu.cfs_quota_us": "150000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/job/memory.limit_in_bytes": "7000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_cgroup_limits_are_the_lowest_of_all_ancestors(
    mounts: str, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(mounts + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_quota(tmp_path) == 1.5
    assert memory_limit(tmp_path) == 7000
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    [cores] = [one for one in machine_findings(tmp_path, tmp_path) if one.name == "cores"]
    assert cores.state == "low"
    assert "the cgroup quota is 1.5" in cores.found
