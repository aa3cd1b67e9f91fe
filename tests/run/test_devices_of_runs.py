"""How many groups a machine runs at once, and which runs are refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.fake_devices import CUDA, H100, MI300X, MIG, ROCM, amd_nodes, fake_machine, nvidia_nodes
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.errors import LaunchError
from btm_scale.run.launchers import placement
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir
from btm_scale.util.device_query import TorchDevices

EXPERTS = ["python", "licences", *(f"random/{i}" for i in range(2)), *["python"] * 12]  # more than fit


def config_of(folder: Path, *, device: str = "auto", **layout: Any) -> RunConfig:
    values = tiny_values(folder, layout={"precision": "fp32", "micro_batch": 1} | layout, launch={"device": device})
    return write_config(folder / "run.yaml", values)


@pytest.mark.parametrize(
    ("torch", "nodes", "device", "ranks", "slots"),
    [
        (TorchDevices(CUDA, (H100,) * 8), nvidia_nodes(*range(8)), "auto", 2, 4),
        (TorchDevices(CUDA, (H100,) * 2), nvidia_nodes(2, 3), "auto", 1, 2),
        (TorchDevices(CUDA, (MIG,)), nvidia_nodes(0), "auto", 1, 3),
        (TorchDevices(CUDA, (H100,) * 8), nvidia_nodes(*range(8)), "cpu", 2, 6),
        (TorchDevices("CPU"), [], "auto", 2, 6),
    ],
    ids=["nvidia", "container", "mig", "cpu chosen", "none"],
)
def test_as_many_groups_run_at_once_as_fit_the_gpus_or_else_the_cores(
    torch: TorchDevices,
    nodes: list[str],
    device: str,
    ranks: int,
    slots: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nodes, mig=("MIG-1", "MIG-2", "MIG-3"))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)))
    assert placement(config_of(tmp_path, device=device, data=ranks), EXPERTS).slots == slots


def test_groups_fill_the_gpus_of_an_amd_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch, tmp_path, torch=TorchDevices(ROCM, (MI300X,) * 8), nodes=amd_nodes(tmp_path, 8))
    assert placement(config_of(tmp_path), EXPERTS).slots == 8


@pytest.mark.parametrize(
    ("torch", "layout", "message"),
    [
        (
            TorchDevices("CPU"),
            {},
            r"This machine has GPUs \(/dev/nvidia0\), and torch can use none: this is a CPU build",
        ),
        (TorchDevices(CUDA, (H100,)), {"data": 2}, "'seed' has 2 ranks, and this machine has 1 visible GPU. Each rank"),
        (TorchDevices(CUDA, (MIG,)), {"tensor": 2}, "'seed' has 2 ranks, and this machine's GPUs are MIG instances"),
    ],
)
def test_a_run_that_its_gpus_cannot_train_is_refused_before_anything_is_written(
    torch: TorchDevices, layout: dict[str, int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=torch, nodes=nvidia_nodes(0), mig=("MIG-1", "MIG-2"))
    run = RunDir(tmp_path / "run")
    with pytest.raises(LaunchError, match=message):
        open_run(config_of(tmp_path, **layout), run, trains_here=True)
    assert not run.root.exists()
    open_run(config_of(tmp_path, device="cpu", **layout), run, trains_here=True)
    assert run.config.exists()


def test_why_a_run_is_on_the_cpu_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    eight = TorchDevices(CUDA, (H100,) * 8)
    fake_machine(monkeypatch, tmp_path, torch=eight, nodes=nvidia_nodes(0), CUDA_VISIBLE_DEVICES="")
    with caplog.at_level("INFO", "btm_scale"):
        open_run(config_of(tmp_path), RunDir(tmp_path / "run"), trains_here=True)
    assert caplog.text.count("groups run on the CPU: CUDA_VISIBLE_DEVICES='' hides every GPU") == 1
    assert "float8" not in caplog.text
    with caplog.at_level("INFO", "btm_scale"):
        config = config_of(tmp_path, precision="bf16", float8=True)
        open_run(config, RunDir(tmp_path / "other"), trains_here=True)
    assert "layout.float8 is emulated on a CPU" in caplog.text
