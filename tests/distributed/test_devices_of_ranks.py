"""The device of each rank: its own GPU, or the CPU if that was chosen."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers.fake_devices import CUDA, H100, fake_machine, nvidia_nodes

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup, require_own_gpu
from btm_scale.distributed.rendezvous import require_alone_on
from btm_scale.errors import LaunchError
from btm_scale.launch.local import free_port
from btm_scale.util.device_query import TorchDevices


def test_a_rank_beyond_the_gpus_of_its_host_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    fake_machine(monkeypatch, tmp_path, torch=TorchDevices(CUDA, (H100,) * 8), nodes=nvidia_nodes(*range(8)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in {"RANK": "11", "LOCAL_RANK": "8", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"Rank 11 on \S+ has LOCAL_RANK 8, and sees 8 GPUs\. .* at most 8 per host"):
        ExpertGroup.join(Layout(data=16, precision="fp32"))
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert require_own_gpu(8) == 7


def test_a_rank_without_the_gpu_that_its_job_was_given_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, tmp_path, torch=TorchDevices(CUDA), nodes=nvidia_nodes(0), SLURM_JOB_ID="7")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(LaunchError, match="this SLURM job was given no GPU"):
        ExpertGroup.join(Layout(precision="fp32"))


CLAIM = """
from btm_scale.distributed.rendezvous import init_process_group
from btm_scale.errors import LaunchError
try:
    init_process_group("gloo", own_gpu="GPU-8ab1")
except LaunchError as error:
    print(error)
"""


def test_two_ranks_on_one_gpu_are_refused() -> None:
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    # The rank that comes second is refused; the other waits for it until its launcher ends the group.
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
    [message] = filter(None, (rank.communicate()[0] for rank in ranks))
    assert "both have GPU GPU-8ab1" in message


def test_ranks_with_different_gpus_are_not_refused() -> None:
    store = dist.TCPStore("127.0.0.1", free_port(), 1, is_master=True)
    for rank, gpu in enumerate(["GPU-8ab1", "GPU-77c0"]):
        require_alone_on(gpu, store, rank)
    with pytest.raises(LaunchError, match="Ranks 1 and 2 both have GPU GPU-77c0"):
        require_alone_on("GPU-77c0", store, 2)


# A machine with one GPU, as torch sees it in every process: it is there unless CUDA_VISIBLE_DEVICES hides it.
ONE_GPU = """
import os
import torch

def visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] in ("0", "GPU-1")

torch.cuda.is_available = visible
torch.cuda.device_count = lambda: int(visible())
torch.cuda.get_device_name = lambda device=None: "NVIDIA H100 80GB HBM3"
"""


def test_ranks_of_deepspeeds_launcher_leave_hidden_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher shows each rank the GPU again."""
    (tmp_path / "sitecustomize.py").write_text(ONE_GPU)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    script = tmp_path / "rank.py"
    script.write_text(
        "import os\n"
        "from btm_scale.config.layout import Layout\n"
        "shown = os.environ['CUDA_VISIBLE_DEVICES']\n"
        "from btm_scale.distributed.group import ExpertGroup\n"
        "import torch\n"
        "group = ExpertGroup.join(Layout(precision='fp32'))\n"
        "print(f'shown {shown}, on {group.device}, GPU: {torch.cuda.is_available()}', flush=True)\n"
        "group.leave()\n"
    )
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0]}).encode()).decode()
    words = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1"]
    words += [f"--master_port={free_port()}", "--no_local_rank", str(script)]
    done = subprocess.run(
        [sys.executable, *words], env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=True
    )
    assert "shown 0, on cpu, GPU: False" in done.stdout
