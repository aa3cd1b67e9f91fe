"""Whether a process uses GPUs, and which: the setting `launch.device`, what torch finds, and what the job was given.

A process that was given GPUs and whose torch can use none is refused, because hours on GPUs are weeks on CPUs.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from btm_scale.errors import LaunchError, NoUsableGpuError
from btm_scale.util.device_query import VISIBLE, TorchDevices, ask_torch, torch_devices

Device = Literal["auto", "gpu", "cpu"]

# The environment variable that overrides launch.device. Launchers set it for their ranks, because DeepSpeed's launcher
# sets CUDA_VISIBLE_DEVICES to the numbers of its ranks, also on a machine whose GPUs are hidden.
DEVICE = "BTM_SCALE_DEVICE"

_ON_CPU = {DEVICE: "cpu", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
# A number, which may be negative, or the UUID of a GPU or of a MIG instance; SLURM writes NoDevFiles for no GPU.
_NAMES_A_GPU = re.compile(r"\d+|(GPU|MIG)-[^,]+")
_ROOT = Path("/")


@dataclass(frozen=True)
class Gpus:
    """The GPUs of this process: `names` as the variables of a child process name them, and the kind of each.

    Empty on a CPU; `reason` says why then.
    """

    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    is_amd: bool = False
    reason: str = ""

    @property
    def are_mig(self) -> bool:
        """Whether these are MIG instances, of which CUDA gives a process only one."""
        return any(name.startswith("MIG-") for name in self.names)

    def environment(self, names: tuple[str, ...]) -> dict[str, str]:
        """Return the variables of a child process that uses some of these GPUs; those of the CPU for none."""
        if not names:
            return dict(_ON_CPU)
        visible = ",".join(names)
        # On AMD, HIP's own variable has precedence over CUDA's, which DeepSpeed's launcher sets.
        return {"HIP_VISIBLE_DEVICES": visible} if self.is_amd else {"CUDA_VISIBLE_DEVICES": visible}


def usable_gpus(device: Device, *, in_this_process: bool = False) -> Gpus:
    """Return the GPUs that this process may use; none if it is to use the CPU.

    `device` is launch.device, which the environment variable BTM_SCALE_DEVICE overrides. `auto` uses the GPUs, or the
    CPU of a machine without any. All GPUs hidden by the user, such as by CUDA_VISIBLE_DEVICES="", means the CPU.
    A rank, which imports torch anyway, asks it `in_this_process`; a launcher asks a child.

    Raises LaunchError, with the reason, if GPUs were requested or given to the job, and torch can use none.
    """
    device = _settled(device)
    if device == "cpu":
        return Gpus(reason=f"{_setting()} is cpu")
    hidden = hiding_variable(os.environ)
    if hidden and device == "auto":
        return Gpus(reason=f"{hidden}='{os.environ[hidden]}' hides every GPU")
    if hidden:
        raise LaunchError(
            f"{_setting()} is gpu, and {hidden}='{os.environ[hidden]}' hides every GPU. A GPU must be visible: unset "
            f"{hidden}, or set launch.device: cpu."
        )
    nodes = driver_nodes()
    evidence = _given(device, nodes)
    if in_this_process:
        detected = torch_devices()
    elif evidence:
        detected = ask_torch()
    else:  # without any driver there is nothing to ask, which saves seconds
        detected = TorchDevices("unknown")
    if detected.gpus:
        return _named(detected)
    if evidence:
        reason, remedy = why_none(detected, os.environ, nodes)
        is_of_the_host = _slurm_variable(os.environ) is not None and detected.build not in ("CPU", "unknown")
        raise (NoUsableGpuError if is_of_the_host else LaunchError)(
            f"{evidence}, and torch can use none: {reason}. A run that was given GPUs does not continue on the CPU: "
            f"{remedy}, or set launch.device: cpu."
        )
    return Gpus(reason="this machine has no GPU")


def usable_gpus_or_none(device: Device) -> Gpus:
    """Like `usable_gpus`, but returns none instead of raising: for estimates on a machine that trains nothing."""
    try:
        return usable_gpus(device)
    except LaunchError as error:
        return Gpus(reason=str(error))


def hide_gpus_if_on_cpu(device: Device, environment: MutableMapping[str, str] = os.environ) -> None:
    """Hide every GPU from this process and its children if `device` or the environment chooses the CPU.

    Call it before torch first uses CUDA, which reads these variables only once.
    """
    if _settled(device, environment) == "cpu":
        environment.update(_ON_CPU)


def environment_of_ranks(device: Device) -> dict[str, str]:
    """Return the variables of ranks on any host: those of the CPU if it was chosen, else none."""
    return dict(_ON_CPU) if _settled(device) == "cpu" else {}


def environment_of_this_host(device: Device) -> dict[str, str]:
    """Return the variables of launchers and ranks on this host, whose GPUs may be hidden or absent; asks no child."""
    device = _settled(device)
    if device == "cpu" or (device == "auto" and hiding_variable(os.environ)):
        return dict(_ON_CPU)
    return {} if driver_nodes() or device == "gpu" else {"DS_ACCELERATOR": "cpu"}


def hiding_variable(environment: Mapping[str, str]) -> str | None:
    """Return the variable by which the user hides every GPU: empty or -1, and no other one names a GPU."""
    values = {name: environment[name].strip() for name in VISIBLE if name in environment}
    hiding = [name for name, value in values.items() if value.partition(",")[0] in ("", "-1")]
    return hiding[0] if hiding and len(hiding) == len(values) else None


def is_bound_to_one(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher gave this process a single GPU, which is then number 0 whatever its name."""
    values = [environment[name] for name in VISIBLE if environment.get(name)]
    return any(_NAMES_A_GPU.fullmatch(value.strip()) for value in values)


def driver_nodes(root: Path | None = None) -> list[str]:
    """Return the device nodes of GPU drivers on this machine. They show that there are GPUs, never how many.

    WSL2 and processors with an integrated AMD GPU always have a node; theirs count only with a GPU that can train.
    """
    root = root or _ROOT
    nodes = [*root.glob("dev/nvidia[0-9]*"), *root.glob("dev/nvhost-gpu"), *root.glob("dev/nvgpu")]
    if (root / "dev/dxg").exists() and any(root.glob("usr/lib/wsl/lib/libcuda.so*")):
        nodes.append(root / "dev/dxg")
    if (root / "dev/kfd").exists() and _has_amd_card(root / "sys/class/kfd/kfd/topology/nodes"):
        nodes.append(root / "dev/kfd")
    return sorted(f"/{node.relative_to(root)}" for node in nodes)


def why_none(detected: TorchDevices, environment: Mapping[str, str], nodes: list[str]) -> tuple[str, str]:
    """Return (reason, remedy) for a torch that can use no GPU."""
    words = {name: environment[name] for name in VISIBLE if environment.get(name)}
    unusual = next((name for name, value in words.items() if not _NAMES_A_GPU.match(value.strip())), None)
    in_slurm = "SLURM_JOB_ID" in environment
    request = "request GPUs for the job, such as launch.slurm.gres: gpu:8"
    if detected.build == "unknown" and detected.problem:
        return detected.problem, "fix the installation of torch"
    if detected.build == "CPU":
        return "this is a CPU build of torch", "install a CUDA or ROCm build: see https://pytorch.org/get-started"
    if not nodes:
        return "this machine has no GPU driver", "run on a machine with GPUs"
    if nodes == ["/dev/kfd"] and detected.build.startswith("CUDA"):
        return f"this build of torch is for {detected.build}, and the GPU is AMD's", "install a ROCm build of torch"
    if unusual:
        return f"{unusual}={words[unusual]} names none", request if in_slurm else f"correct or unset {unusual}"
    if in_slurm and not _slurm_variable(environment):
        return "this SLURM job was given no GPU", request
    closed = [node for node in nodes if Path(node).exists() and not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        return f"no permission to open {closed[0]}", "add this user to the group of the node, such as render"
    if detected.problem:
        return f"torch ({detected.build}) reports: {detected.problem.rstrip('.')}", (
            "update the driver, or install a build of torch for it"
        )
    if words:
        name, value = next(iter(words.items()))
        return f"{name}={value} names none of this machine's GPUs", f"correct or unset {name}"
    return f"torch ({detected.build}) finds none", "see btm-scale doctor"


def _settled(device: Device, environment: Mapping[str, str] = os.environ) -> Device:
    chosen = environment.get(DEVICE) or device
    if chosen not in ("auto", "gpu", "cpu"):
        raise LaunchError(f"{DEVICE} is '{chosen}'. It must be auto, gpu or cpu: unset it, or choose one of them.")
    return chosen  # type: ignore[return-value]


def _setting() -> str:
    return DEVICE if os.environ.get(DEVICE) else "launch.device"


def _named(detected: TorchDevices) -> Gpus:
    """Return the GPUs that torch finds under the names that a child's variable can hold."""
    is_amd = detected.build.startswith("ROCm")
    variable = next((name for name in (VISIBLE[1::-1] if is_amd else VISIBLE[:1]) if os.environ.get(name)), None)
    listed = [name.strip() for name in os.environ[variable].split(",")] if variable else []
    if not listed and any(" MIG " in f"{kind} " for kind in detected.gpus):
        listed = _mig_instances()
    if detected.gpus and listed and listed[0].startswith("MIG-"):
        # CUDA shows a process the first of its instances only, and each group is a process of one rank.
        return Gpus(tuple(listed), detected.gpus[:1] * len(listed))
    names = listed[: len(detected.gpus)] if listed else list(map(str, range(len(detected.gpus))))
    return Gpus(tuple(names), detected.gpus, is_amd)


def _mig_instances() -> list[str]:
    """Return the UUIDs of the MIG instances that the driver lists; empty if nvidia-smi does not answer."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"UUID: (MIG-[^)\s]+)", done.stdout)


def _given(device: Device, nodes: list[str]) -> str:
    """Return the fact that this process was meant to use GPUs; empty if it was not."""
    if device == "gpu":
        return f"{_setting()} is gpu"
    name = _slurm_variable(os.environ)
    if name:
        return f"SLURM gave this job GPUs ({name}={os.environ[name]})"
    return f"This machine has GPUs ({', '.join(nodes[:2])}{', ...' if len(nodes) > 2 else ''})" if nodes else ""


def _slurm_variable(environment: Mapping[str, str]) -> str | None:
    """Return the variable in which SLURM has the numbers of this job's GPUs, or their count here; None without GPUs."""
    for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if environment.get(name):
            return name
    count = "SLURM_GPUS_ON_NODE"
    return count if environment.get(count, "0") not in ("", "0") else None


def _has_amd_card(topology: Path) -> bool:
    """Return whether a node of the kernel's topology is a GPU that is not part of a processor."""
    seen = False
    for path in topology.glob("*/properties"):
        lines = (line.split() for line in path.read_text().splitlines())
        values = {line[0]: line[1] for line in lines if len(line) == 2}
        seen = True
        if int(values.get("simd_count", 0)) > 0 and int(values.get("cpu_cores_count", 0)) == 0:
            return True
    return not seen
