"""On which device the verbs compute that start no group: generate, serve, ablate, mixture and upcycle."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.fake_devices import CUDA, H100, MI300X, MIG, ROCM, amd_nodes, fake_machine, nvidia_nodes

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.errors import UserError
from btm_scale.model.hf_decoder import usable_device
from btm_scale.run_dir import RunDir
from btm_scale.util.device_query import TorchDevices

NO_DRIVER = TorchDevices(CUDA, (), "CUDA driver version is insufficient")


@pytest.mark.parametrize(
    ("torch", "nodes", "environment", "device"),
    [
        (TorchDevices(CUDA, (H100,) * 8), nvidia_nodes(*range(8)), {}, "cuda"),
        (TorchDevices(CUDA, (H100,) * 2), nvidia_nodes(2, 3), {}, "cuda"),
        (TorchDevices(CUDA, (MIG,)), nvidia_nodes(0), {}, "cuda"),
        (TorchDevices("CPU"), [], {}, "cpu"),
        (TorchDevices(CUDA), nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        (TorchDevices(CUDA, (H100,)), nvidia_nodes(0), {"BTM_SCALE_DEVICE": "cpu"}, "cpu"),
    ],
    ids=["nvidia", "container", "mig", "none", "hidden", "cpu chosen"],
)
def test_a_gpu_is_used_if_this_process_has_one(
    torch: TorchDevices,
    nodes: list[str],
    environment: dict[str, str],
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nodes, **environment)
    assert usable_device(None) == device


def test_a_gpu_of_amd_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, tmp_path, torch=TorchDevices(ROCM, (MI300X,)), nodes=amd_nodes(tmp_path, 1))
    assert usable_device(None) == "cuda"


@pytest.mark.parametrize(
    ("torch", "nodes", "environment", "reason"),
    [
        (NO_DRIVER, nvidia_nodes(0), {}, "driver version is insufficient"),
        (TorchDevices("CPU"), nvidia_nodes(0), {}, "this is a CPU build of torch"),
        (TorchDevices(CUDA), nvidia_nodes(0), {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "names none"),
        (TorchDevices(CUDA), [], {"SLURM_JOB_ID": "7", "SLURM_JOB_GPUS": "0,1"}, "this machine has no GPU driver"),
    ],
    ids=["old driver", "CPU build", "NoDevFiles", "SLURM"],
)
def test_given_gpus_are_never_replaced_by_the_cpu(
    torch: TorchDevices,
    nodes: list[str],
    environment: dict[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nodes, **environment)
    with pytest.raises(UserError, match=f"torch can use none: .*{reason}.*--device cpu"):
        usable_device(None)
    assert usable_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "RUN", "--prompt", "The"),
        ("serve", "RUN", "--port", "0"),
        ("upcycle", "RUN"),
        ("ablate", "RUN", "--text", __file__),
        ("mixture", "RUN", "--text", __file__),
    ],
    ids=lambda words: words[0],
)
def test_a_verb_that_was_given_gpus_does_not_continue_on_the_cpu(
    words: tuple[str, ...],
    handmade: tuple[RunConfig, RunDir],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=NO_DRIVER, nodes=nvidia_nodes(0))
    with pytest.raises(SystemExit) as end:
        main([str(handmade[1].root) if word == "RUN" else word for word in words])
    assert end.value.code == 2
    assert "torch can use none" in capsys.readouterr().err
