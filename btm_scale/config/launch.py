"""The section `launch` of a run's YAML: how its groups are started."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from btm_scale.config.secrets import no_secret_variables, no_secret_words
from btm_scale.config.section import Bytes, Section
from btm_scale.util.devices import Device


def _slurm_word(text: str) -> str:
    # SLURM reads it from a line of options, so it must end neither the value nor the line.
    if not re.fullmatch(r"[\w.,:@/+=*\[\]%-]+", text):
        raise ValueError(
            f"'{text}' is not valid in a SLURM option. Use letters, digits and . , : @ / + = * [ ] % - only."
        )
    return text


def _slurm_time(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", text):
        raise ValueError(f"'{text}' is not a SLURM time. Write minutes, H:MM:SS or D-HH:MM:SS, such as 24:00:00.")
    return text


def _one_line(text: str) -> str:
    if not text.isprintable() or text.startswith("#"):
        raise ValueError(f"{text!r} is not a single line. Give each line as a separate item, without '#SBATCH'.")
    return text


def _port_range(ports: tuple[int, int]) -> tuple[int, int]:
    first, last = ports
    if not 0 < first <= last < 65_536:
        raise ValueError(f"{list(ports)} is not a range of ports. Give the first and the last, such as [29500, 30499].")
    return ports


# Options of sbatch that follow from layouts and other keys. sbatch takes the last of two equal options.
_OWN_OPTIONS = {
    "nodes": "the layout and launch.slurm.ranks_per_node",
    "ntasks": "the layout",
    "ntasks-per-node": "the layout and launch.slurm.ranks_per_node",
    "ntasks-per-gpu": "the layout: each rank uses one GPU",
    "array": "the experts and launch.slurm.at_a_time",
    "dependency": "the stages of the run",
    "output": "the run's folder, where status looks for it",
    "exclude": "launch.slurm.exclude",
    "signal": "launch.slurm.signal_seconds",
    "clusters": "the variable SLURM_CLUSTERS, which squeue reads too",
}
_SHORT = {
    "-M": "clusters",
    "-N": "nodes",
    "-n": "ntasks",
    "-a": "array",
    "-d": "dependency",
    "-o": "output",
    "-x": "exclude",
}


def _no_own_option(options: tuple[str, ...]) -> tuple[str, ...]:
    for option in options:
        word = re.split(r"[=\s]", option.strip(), maxsplit=1)[0]
        name = _SHORT.get(word[:2]) if not word.startswith("--") else word.removeprefix("--")
        if name in _OWN_OPTIONS:
            raise ValueError(
                f"'{option}' sets what follows from {_OWN_OPTIONS[name]}. Change that, and remove the option."
            )
        if name == "gpus-per-task" and not re.fullmatch(r".*[=\s]([a-z]\w*:)?1", option.strip(), re.IGNORECASE):
            raise ValueError(f"'{option}' is not one GPU. Each rank uses one: set --gpus-per-task=1, or remove it.")
    return options


def _one_kind_of_memory(options: tuple[str, ...]) -> tuple[str, ...]:
    kinds = {kind[0]: option for option in options if (kind := re.match(r"\s*--mem(-per-[cg]pu)?(?=[=\s])", option))}
    if len(kinds) > 1:
        named = " and ".join(f"'{option}'" for option in kinds.values())
        raise ValueError(f"{named} exclude each other: sbatch takes one kind of memory. Keep one of them.")
    return options


def _gloo_interface(variables: dict[str, str]) -> dict[str, str]:
    name = variables.get("GLOO_SOCKET_IFNAME", "")
    if name.startswith("^"):
        raise ValueError(
            f"GLOO_SOCKET_IFNAME is '{name}'. Only NCCL leaves out interfaces by ^: name the one to use, such as eth0."
        )
    return variables


SlurmWord = Annotated[str, AfterValidator(_slurm_word)]
Line = Annotated[str, AfterValidator(_one_line)]
SbatchOptions = Annotated[
    tuple[Line, ...],
    AfterValidator(no_secret_words),
    AfterValidator(_no_own_option),
    AfterValidator(_one_kind_of_memory),
]


class LocalConfig(Section):
    """How groups share one machine."""

    slots: int | None = Field(
        default=None, gt=0, description="groups that run at once; default: as many as fit the cores"
    )


class DeepSpeedConfig(Section):
    """How groups share the hosts of a hostfile."""

    hostfile: Path = Field(default=Path("/job/hostfile"), description="lines of `HOST slots=N`")
    connect: Annotated[tuple[str, ...], AfterValidator(no_secret_words)] = Field(
        default=(),
        description="the command that runs another on {host}, such as [ssh, -tt, '{host}']; default: pdsh over ssh",
    )
    environment: Annotated[dict[str, str], AfterValidator(no_secret_variables), AfterValidator(_gloo_interface)] = (
        Field(default_factory=dict, description="variables of every rank, such as NCCL_SOCKET_IFNAME: eth0")
    )
    ports: Annotated[tuple[int, int], AfterValidator(_port_range)] = Field(
        default=(29500, 30499), description="first and last port for the rendezvous of a group"
    )
    threads: int = Field(default=1, gt=0, description="CPU threads per rank")


class SlurmConfig(Section):
    """What the jobs request from SLURM. One job trains one model, with ranks that `srun` starts."""

    partition: SlurmWord | None = None
    account: SlurmWord | None = None
    qos: SlurmWord | None = None
    time: Annotated[str, AfterValidator(_slurm_time)] = Field(
        default="24:00:00", description="time limit of a job; a model that takes longer resumes in the next job"
    )
    ranks_per_node: int = Field(default=8, gt=0, description="GPUs per node; a larger group takes several nodes")
    cpus_per_rank: int | None = Field(default=None, gt=0)
    gres: SlurmWord | None = Field(
        default=None,
        description="generic resources of a full node, such as gpu:8; a job requests one GPU per rank",
    )
    exclusive: bool = Field(
        default=False, description="request nodes that no other job shares, for jobs that fill them"
    )
    exclude: SlurmWord | None = Field(default=None, description="nodes that no job may use, such as n[03,07]")
    max_excluded: int = Field(
        default=4,
        ge=0,
        description="how many nodes that failed groups twice are excluded as well, at most a quarter of the nodes",
    )
    container: SlurmWord | None = Field(default=None, description="image for srun --container-image")
    mounts: SlurmWord | None = Field(default=None, description="for srun --container-mounts")
    python: str | None = Field(default=None, description="the interpreter on the nodes; default: the one that submits")
    at_a_time: int | None = Field(default=None, gt=0, description="experts that may train at once")
    retries: int = Field(default=3, ge=0, description="how often to requeue a job that lost a node or a rank")
    signal_seconds: int = Field(
        default=120,
        ge=10,
        lt=65_536,
        description="seconds before the time limit at which a job saves a checkpoint and requeues",
    )
    options: SbatchOptions = Field(default=(), description="more #SBATCH options, such as --constraint=h100")
    big_domain: Bytes = Field(
        default=20_000_000_000,
        description="size of a domain's files from which several such domains are prepared side by side, each by a "
        "task of an array",
    )
    prepare_options: SbatchOptions = Field(
        default=(),
        description="#SBATCH options of the job that prepares text, which requests no GPU: --partition=cpu and "
        "--cpus-per-task=32, or --gres=gpu:1 where each job must request one",
    )
    setup: Annotated[tuple[Line, ...], AfterValidator(no_secret_words)] = Field(
        default=(), description="shell lines before the ranks start: module load ..."
    )


class MpiConfig(Section):
    """How `run --launcher mpi` starts mpirun."""

    command: Annotated[tuple[str, ...], AfterValidator(no_secret_words)] = Field(
        default=("mpirun",), min_length=1, description="mpirun and its options"
    )
    ranks: int | None = Field(
        default=None, gt=0, description="ranks to start; default: one per GPU, or one per core without GPUs"
    )
    threads: int = Field(default=1, gt=0, description="CPU threads per rank")


class LaunchConfig(Section):
    """How groups are started, and on which devices."""

    device: Device = Field(
        default="auto",
        description="gpu or cpu; auto: the GPUs, or the CPU of a machine that has none. A job that was given GPUs and "
        "can use none stops, unless this is cpu",
    )
    local: LocalConfig = LocalConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    slurm: SlurmConfig = SlurmConfig()
    mpi: MpiConfig = MpiConfig()
