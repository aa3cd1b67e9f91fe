"""Which GPUs a process uses, and when it refuses the CPU, on simulated machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_devices import CUDA, H100, MI300X, MIG, ROCM, amd_nodes, fake_machine, nvidia_nodes

from btm_scale.errors import LaunchError
from btm_scale.util import device_query
from btm_scale.util.device_query import TorchDevices, torch_devices
from btm_scale.util.devices import driver_nodes, environment_of_this_host, hide_gpus_if_on_cpu, usable_gpus

EIGHT = TorchDevices(CUDA, (H100,) * 8)
NO_GPU = TorchDevices(CUDA)
ON_CPU = TorchDevices("CPU")


@pytest.mark.parametrize(
    ("torch", "nodes", "environment", "names"),
    [
        (EIGHT, nvidia_nodes(*range(8)), {}, "0,1,2,3,4,5,6,7"),
        (TorchDevices(CUDA, (H100,) * 2), nvidia_nodes(2, 3), {}, "0,1"),
        (TorchDevices(CUDA, (H100,) * 2), nvidia_nodes(*range(8)), {"CUDA_VISIBLE_DEVICES": "2, 3"}, "2,3"),
        (
            TorchDevices(CUDA, (H100,) * 2),
            nvidia_nodes(*range(8)),
            {"CUDA_VISIBLE_DEVICES": "GPU-8ab1,GPU-77c0"},
            "GPU-8ab1,GPU-77c0",
        ),
        # CUDA ignores what follows a number that it has no GPU for.
        (TorchDevices(CUDA, (H100,)), nvidia_nodes(0, 1), {"CUDA_VISIBLE_DEVICES": "1,9,0"}, "1"),
        (TorchDevices(CUDA, (MIG,)), nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, "MIG-a,MIG-b"),
        (TorchDevices(CUDA, (MIG,)), nvidia_nodes(0), {}, "MIG-x,MIG-y,MIG-z"),
        (TorchDevices(CUDA, (H100,)), ["dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"], {}, "0"),
    ],
    ids=["eight", "container", "numbers", "uuids", "cut", "mig chosen", "mig listed", "wsl2"],
)
def test_gpus_have_the_names_that_a_childs_variable_can_hold(
    torch: TorchDevices,
    nodes: list[str],
    environment: dict[str, str],
    names: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nodes, mig=("MIG-x", "MIG-y", "MIG-z"), **environment)
    gpus = usable_gpus("auto")
    assert ",".join(gpus.names) == names
    assert gpus.environment(gpus.names) == {"CUDA_VISIBLE_DEVICES": names}


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, "0,1,2,3,4,5,6,7"),
        ({"HIP_VISIBLE_DEVICES": "6,7"}, "6,7"),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"),
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, "0,1"),  # HIP numbers what ROCR leaves
        ({"ROCR_VISIBLE_DEVICES": "4,5,6", "HIP_VISIBLE_DEVICES": "1,2"}, "1,2"),
    ],
)
def test_amd_gpus_are_chosen_by_hips_variable(
    environment: dict[str, str], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = TorchDevices(ROCM, (MI300X,) * len(names.split(",")))
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=amd_nodes(tmp_path, 8), **environment)
    gpus = usable_gpus("auto")
    assert ",".join(gpus.names) == names
    assert gpus.environment(gpus.names) == {"HIP_VISIBLE_DEVICES": names}


@pytest.mark.parametrize(
    ("torch", "nodes", "environment", "message"),
    [
        (ON_CPU, nvidia_nodes(0), {}, r"GPUs \(/dev/nvidia0\), and torch can use none: this is a CPU build of torch\."),
        (
            TorchDevices(CUDA, problem="The NVIDIA driver on your system is too old (found version 11040)."),
            nvidia_nodes(0, 1, 2),
            {},
            r"nvidia1, \.\.\.\), and .*reports: The NVIDIA driver on your system is too old \(found version 11040\)"
            r"\. A run .*: update the driver",
        ),
        (NO_GPU, ["dev/kfd"], {}, "this build of torch is for CUDA 12.8, and the GPU is AMD's"),
        (NO_GPU, nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "CUDA_VISIBLE_DEVICES=NoDevFiles names none"),
        (
            NO_GPU,
            nvidia_nodes(0),
            {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_JOB_ID": "7"},
            r"NoDevFiles names none.*: request GPUs for the job, such as launch\.slurm\.gres: gpu:8",
        ),
        (NO_GPU, nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": "2"}, "CUDA_VISIBLE_DEVICES=2 names none of this machine's"),
        (NO_GPU, nvidia_nodes(0), {"SLURM_JOB_ID": "7"}, "this SLURM job was given no GPU"),
        (
            NO_GPU,
            nvidia_nodes(0),
            {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1"},
            r"SLURM gave this job GPUs \(SLURM_JOB_GPUS=0,1\), and torch can use none: torch \(CUDA 12\.8\) finds none",
        ),
        (ON_CPU, [], {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}, "this is a CPU build of torch"),
        (ON_CPU, [], {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0"}, r"gave this job GPUs \(SLURM_JOB_GPUS=0\)"),
        (TorchDevices("unknown", problem="torch cannot be used (ImportError: libc)"), nvidia_nodes(0), {}, "libc"),
        (ON_CPU, ["dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"], {}, r"/dev/dxg\), and torch can use none: this is a CPU"),
    ],
)
def test_a_process_that_was_given_gpus_and_can_use_none_is_refused_with_the_reason(
    torch: TorchDevices,
    nodes: list[str],
    environment: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nodes, **environment)
    for is_rank in (False, True):
        with pytest.raises(LaunchError, match=message) as refused:
            usable_gpus("auto", in_this_process=is_rank)
        assert str(refused.value).endswith("or set launch.device: cpu.")
    assert usable_gpus("cpu").names == ()


@pytest.mark.parametrize(
    ("torch", "nodes", "environment", "reason"),
    [
        (ON_CPU, [], {}, "this machine has no GPU"),
        (ON_CPU, ["dev/dxg"], {}, "this machine has no GPU"),  # WSL2 without an NVIDIA driver
        (NO_GPU, [], {"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "0"}, "this machine has no GPU"),
        (NO_GPU, [], {"CUDA_VISIBLE_DEVICES": "0,1"}, "this machine has no GPU"),  # DeepSpeed's numbers of ranks
        (EIGHT, nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='' hides every GPU"),
        (EIGHT, nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": "-1,-1"}, "CUDA_VISIBLE_DEVICES='-1,-1' hides every GPU"),
        (EIGHT, nvidia_nodes(0), {"BTM_SCALE_DEVICE": "cpu"}, "BTM_SCALE_DEVICE is cpu"),
    ],
)
def test_a_machine_without_gpus_and_a_user_who_hides_them_get_the_cpu(
    torch: TorchDevices,
    nodes: list[str],
    environment: dict[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nodes, **environment)
    gpus = usable_gpus("auto")
    assert (gpus.names, gpus.reason) == ((), reason)
    assert gpus.environment(()).items() >= {"BTM_SCALE_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}.items()


def test_a_processor_with_an_integrated_gpu_is_not_a_gpu_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = amd_nodes(tmp_path, 0, integrated=True)
    fake_machine(monkeypatch, tmp_path, torch=ON_CPU, nodes=nodes)
    assert driver_nodes() == []
    assert usable_gpus("auto").reason == "this machine has no GPU"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "launch.device is gpu, and torch can use none: this machine has no GPU driver"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "launch.device is gpu, and CUDA_VISIBLE_DEVICES='' hides every GPU"),
        ({"BTM_SCALE_DEVICE": "tpu"}, "BTM_SCALE_DEVICE is 'tpu'. It must be auto, gpu or cpu"),
    ],
)
def test_requested_gpus_are_never_replaced_by_the_cpu(
    environment: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=NO_GPU, **environment)
    with pytest.raises(LaunchError, match=message):
        usable_gpus("gpu")


def test_the_cpu_is_chosen_for_a_process_and_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, tmp_path, torch=EIGHT, nodes=nvidia_nodes(0))
    environment: dict[str, str] = {"CUDA_VISIBLE_DEVICES": "0,1"}
    hide_gpus_if_on_cpu("auto", environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    hide_gpus_if_on_cpu("cpu", environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    # DeepSpeed's launcher shows a rank GPUs again, under the numbers of the ranks.
    environment["CUDA_VISIBLE_DEVICES"] = "0"
    hide_gpus_if_on_cpu("auto", environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment_of_this_host("auto") == {}
    assert environment_of_this_host("cpu")["BTM_SCALE_DEVICE"] == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment_of_this_host("auto")["BTM_SCALE_DEVICE"] == "cpu"
    assert environment_of_this_host("gpu") == {}  # its ranks refuse to start


def test_a_child_process_answers_as_torch_does_here() -> None:
    assert device_query._ask_torch((None, "a choice that no other test makes", None)) == torch_devices()


def test_a_torch_that_cannot_be_imported_is_reported_as_the_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = device_query._ask_torch((str(tmp_path), None, None))
    assert answer.problem == "torch cannot be used (OSError: libcudart.so.99: cannot open shared object file)"


def test_asking_imports_no_torch_in_this_process() -> None:
    script = "import sys; import btm_scale.util.devices; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
