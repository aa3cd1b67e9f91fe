"""A run as a few readable SLURM batch scripts; slurm_queue.py submits them."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from btm_scale.config.launch import SlurmConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.local import free_port, local_rank
from btm_scale.launch.slurm_environment import for_steps
from btm_scale.launch.supervise import GroupCommand, Start
from btm_scale.run_dir import RunDir

_NOT_A_RENDEZVOUS = ("localhost", "127.0.0.1", "::1")
_TEMPLATES = Path(__file__).parent / "templates"
# Parts of scripts; earlier ones contain later ones.
_PARTS = ("rendezvous", "faults", "encode", "again", "retry", "stops", "steps")
_GPU_COUNT = re.compile(r"(?:--gpus-per-node|--gpus|-G)[=\s]*(?:[A-Za-z]\w*:)?(\d+)")
# The options of sbatch that request GPUs, with their value: --gres=gpu:8, --gpus-per-node 8, -G 8. Those per GPU are
# refused for a job that requests none.
_GPU_OPTION = re.compile(r"--gres\b.*\bgpu\b.*|--gpus\b.*|--tres-per-\w+\b.*\bgpu\b.*|-G\b.*")
_PER_GPU_OPTION = re.compile(r"--(mem|cpus)-per-gpu\b.*|--gpu-(bind|freq)\b.*")


@dataclass(frozen=True)
class Job:
    """One script: `models` are the tasks of its array, the single model that it trains, or empty.

    `domains` are those that it prepares, by default all. In `models`, the name of a domain to prepare has the `prefix`.

    `ranks` is the size of one group, of which each `colocated` share a node; `after` are the jobs that must succeed
    first.
    """

    name: str
    template: str
    models: tuple[str, ...] = ()
    ranks: int = 1
    colocated: int = 1
    after: tuple[str, ...] = ()
    is_array: bool = False
    uses_gpus: bool = True
    domains: tuple[str, ...] = ()
    prefix: str = ""


def nodes_of(job: Job, config: SlurmConfig) -> tuple[int, int]:
    """Return (nodes, tasks per node) of a group of the job: the fewest nodes that have equally many of its ranks.

    Raises LaunchError if less than half of each node would be used, or ranks that must share a node would span two.
    """
    most = config.ranks_per_node
    if job.ranks <= most:
        return 1, job.ranks
    for tasks in range(most, most // 2, -1):
        if job.ranks % tasks == 0 and tasks % job.colocated == 0:
            return job.ranks // tasks, tasks
    raise LaunchError(
        f"{job.name}: {job.ranks} ranks cannot be divided equally over nodes of {most}, or the {job.colocated} that "
        "share a node would span two. Change the layout, or launch.slurm.ranks_per_node."
    )


def render(job: Job, run_name: str, run: RunDir, config: SlurmConfig) -> str:
    """Return the script of a job, with names and paths quoted. Raises LaunchError for control characters in a path."""
    if not str(run.root).isprintable():
        raise LaunchError(
            f"{str(run.root)!r} has control characters. A SLURM script cannot contain them: choose another --out."
        )
    python = config.python or sys.executable
    container = "".join(f" {_quote(word)}" for word in container_options(config))
    parts = {
        "FOLDER": str(run.root),
        "OPTIONS": "\n".join(f"#SBATCH {option}" for option in _options(job, run_name, run, config)),
        # A job that is submitted from a task of an array inherits what names the task.
        "ARRAY": "" if job.is_array else 'unset "${!SLURM_ARRAY_@}"',
        "SETUP": "\n".join(config.setup),
        "MODELS": " ".join(_quote(model.removeprefix(job.prefix)) for model in job.models),
        "DOMAINS": " ".join(map(_quote, job.domains)),
        "CPUS": str(config.cpus_per_rank or ""),
        "RUN": _quote(str(run.root)),
        "CONFIG": _quote(str(run.config)),
        "PYTHON": _quote(python),
        "RANKS": str(job.ranks),
        "RETRIES": str(config.retries),
        "EXCLUDED": _quote(config.exclude or ""),
        "ROOM": str(config.max_excluded),
        "CONTAINER": container,
        "ALONE": f"srun --nodes=1 --ntasks=1{container} " if container else "",
    }
    template = (_TEMPLATES / f"{job.template}.sh").read_text()
    for part in _PARTS:  # what the user has chosen is inserted after them, once
        template = template.replace(f"@{part.upper()}@", (_TEMPLATES / f"{part}.sh").read_text().strip())
    text = re.sub(r"@([A-Z]+)@", lambda match: parts[match[1]], template)
    return re.sub(r"\n{3,}", "\n\n", text)


def container_options(config: SlurmConfig) -> list[str]:
    """Return the options of srun that run a task in a container (pyxis)."""
    options = [f"--container-image={config.container}"] if config.container else []
    return options + ([f"--container-mounts={config.mounts}"] if config.mounts else [])


class SrunPool:
    """The nodes of the current job: one group at a time, started by srun.

    Raises LaunchError outside a job, where srun would queue for resources that this run's config does not name.
    """

    def __init__(self, config: SlurmConfig) -> None:
        if not os.environ.get("SLURM_JOB_ID"):
            raise LaunchError(
                "This process is not in a SLURM job. srun starts groups on the nodes of a job: request one first "
                "(salloc, sbatch), or use btm-scale run CONFIG --launcher slurm, which submits the jobs."
            )
        self._config = config
        self._busy = False

    def take(self, command: GroupCommand) -> Start | None:
        """Return the srun command of a group; None while another group runs."""
        if self._busy:
            return None
        self._busy = True
        python = self._config.python or sys.executable
        cpus = self._config.cpus_per_rank or os.environ.get("SLURM_CPUS_PER_TASK")
        options = [f"--ntasks={command.ranks}", "--kill-on-bad-exit=1", "--export=ALL"]
        options += [f"--cpus-per-task={cpus}"] if cpus else []
        # A step within a step would wait until the outer one gives its processors back.
        options += ["--overlap"] if "SLURM_STEP_ID" in os.environ else []
        options += container_options(self._config)
        words = ("srun", *options, python, "-m", "btm_scale.cli", *command.arguments, "--launcher", "slurm")
        return Start((words,), for_steps(os.environ) | _rendezvous(), only=True)

    def give_back(self, name: str) -> None:
        """Allow the next group."""
        self._busy = False


def _rendezvous() -> dict[str, str]:
    """Return the rendezvous of a group that srun starts: that of the batch script, else one on this job's first node.

    The port is probed on this host, which is the first node of the job.
    """
    address = os.environ.get("MASTER_ADDR") if "SLURM_JOB_ID" in os.environ else None
    if address is None:
        single = os.environ.get("SLURM_JOB_NUM_NODES", "1") == "1"
        address = "127.0.0.1" if single else os.environ.get("SLURM_TOPOLOGY_ADDR") or socket.gethostname()
    return {"MASTER_ADDR": address, "MASTER_PORT": str(free_port())}


def _options(job: Job, run_name: str, run: RunDir, config: SlurmConfig) -> list[str]:
    nodes, tasks = nodes_of(job, config)
    log = str(run.root / "slurm" / job.name).replace("%", "%%") + ("-%A_%a.log" if job.is_array else "-%j.log")
    options = [
        f"--job-name={job_name(run_name, job)}",
        f"--output={_sbatch_quote(log)}",
        "--open-mode=append",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        f"--time={config.time}",
        "--requeue",
        f"--signal=USR1@{config.signal_seconds}",
    ]
    given = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "exclude": config.exclude,
        "cpus-per-task": config.cpus_per_rank,
        "gres": _gres(job, config.gres, tasks) if job.uses_gpus and config.gres else None,
    }
    options += [f"--{name}={value}" for name, value in given.items() if value is not None]
    if config.exclusive and tasks == config.ranks_per_node:  # the rest of a node is for other jobs
        options.append("--exclusive")
    if job.is_array:
        limit = f"%{config.at_a_time}" if config.at_a_time else ""
        options.append(f"--array=0-{len(job.models) - 1}{limit}")
    more = [option.strip() for option in config.options]
    if job.uses_gpus:
        for option in more:
            _require_enough_gpus(job, option, {"per-node": tasks, "": job.ranks})
    options += [
        option
        for option in more
        if job.uses_gpus or not (_GPU_OPTION.fullmatch(option) or _PER_GPU_OPTION.fullmatch(option))
    ]
    # sbatch takes the last of two equal options.
    return options + [option.strip() for option in config.prepare_options if job.template in ("prepare", "texts")]


def _gres(job: Job, full_node: str, tasks: int) -> str:
    """Return the generic resources of a node on which the job has `tasks` ranks, with one GPU for each.

    Raises LaunchError if a node has fewer GPUs.
    """
    items, missing = [], tasks
    for item in full_node.split(","):
        name, *kind = item.split(":")
        if name != "gpu":
            items.append(item)
            continue
        count = min(int(kind.pop()) if kind and kind[-1].isdecimal() else 1, missing)
        missing -= count
        if count:
            items.append(":".join([name, *kind, str(count)]))
    if missing and missing < tasks:
        raise LaunchError(
            f"{job.name} has {tasks} ranks per node, and launch.slurm.gres is {full_node}. Each rank needs one GPU: "
            f"set launch.slurm.ranks_per_node to {tasks - missing}, or raise the number in launch.slurm.gres."
        )
    return ",".join(items)


def _require_enough_gpus(job: Job, option: str, ranks: Mapping[str, int]) -> None:
    """Raise LaunchError if an option requests fewer GPUs than a job has `ranks` per node or in all."""
    match = _GPU_COUNT.fullmatch(option)
    needed = ranks["per-node" if option.startswith("--gpus-per-node") else ""]
    if match is not None and int(match[1]) < needed:
        raise LaunchError(
            f"{job.name} has {needed} ranks{' per node' * option.startswith('--gpus-per-node')}, and "
            f"launch.slurm.options has {option}. Each rank needs one GPU: set launch.slurm.gres instead, from which a "
            "job requests as many as it has ranks."
        )


def requests_gpus(config: SlurmConfig) -> bool:
    """Return whether the jobs that train and score request GPUs."""
    return config.gres is not None or any(_GPU_OPTION.fullmatch(option.strip()) for option in config.options)


def job_name(run_name: str, job: Job) -> str:
    """Return the name of a job in SLURM."""
    return f"{re.sub(r'[^A-Za-z0-9._]+', '-', run_name).strip('-') or 'run'}.{job.name}"


def _quote(text: str) -> str:
    """Return the text as a single word for bash, quoted if needed."""
    if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'([$`"\\])', r"\\\1", text) + '"'


def _sbatch_quote(text: str) -> str:
    """Return the text as a quoted value of an #SBATCH line, in which a backslash escapes the next character."""
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def become_slurm_rank(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK in the environment of a task that srun started.

    Raises LaunchError outside such a task, or if the ranks of several nodes would each wait at their own localhost.
    """
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)} is not set. --launcher slurm is for tasks of a job: submit the scripts that "
            "`btm-scale run CONFIG --launcher slurm` writes."
        )
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    if nodes > 1 and environment["MASTER_ADDR"] in _NOT_A_RENDEZVOUS:
        raise LaunchError(
            f"This group has {nodes} nodes, and MASTER_ADDR is {environment['MASTER_ADDR']}, a different host on each. "
            "Set it to the address of the first node of the job, as the script that btm-scale wrote does."
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = local_rank(environment, environment["SLURM_LOCALID"])
