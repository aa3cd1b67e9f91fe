"""A real SLURM cluster of virtual nodes on this machine: munged, slurmctld and one slurmd per node, on loopback."""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

# 2050 is the error with which a controller refuses a job at a limit of its QOS.
_ROOM = """
function slurm_job_submit(job, parts, user)
  local file = io.open("FULL", "r")
  if file then file:close() end
  if file and job.script then return 2050 end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, parts, user) return slurm.SUCCESS end
return slurm.SUCCESS
"""


class SlurmCluster:
    """Four nodes, n1 to n4, with one task each. SLURM commands with `environment` use this cluster."""

    nodes = ("n1", "n2", "n3", "n4")

    def __init__(self, cores: int = 1, settings: str = "") -> None:
        """`cores` of each node; `settings` are more lines of slurm.conf, which take precedence."""
        self._cores, self._settings = cores, settings
        missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
        if missing:
            pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
        # Short: the path of munge's socket is limited to 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path()}
        for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID"):
            self.environment.pop(name, None)
        (self.folder / "job_submit.lua").write_text(_ROOM.replace("FULL", str(self.full)))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def full(self) -> Path:
        """While this file exists, a cluster with `JobSubmitPlugins=lua` accepts no script, as at a limit."""
        return self.folder / "full"

    def start(self) -> None:
        """Start every daemon, and wait until all nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        state = self.folder / "state"
        state.mkdir()
        (self.folder / "slurm.conf").write_text(self._configuration())
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.folder}/munge.socket",
            f"--key-file={key}",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log",
            f"--seed-file={self.folder}/munged.seed",
        )
        self.wait_for(lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").stdout.split() == ["idle"])

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, for the first time or after its death."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node like a power cut: its slurmd and all of its tasks."""
        slurmd = self._daemons.pop(f"slurmd -D -N {node}")
        slurmd.kill()
        self._kill_tasks(node)
        slurmd.wait()

    def _kill_tasks(self, *nodes: str) -> None:
        for task in self._tasks(*nodes):
            with contextlib.suppress(psutil.Error):
                steps = [parent for parent in task.parents() if parent.name() == "slurmstepd"]
                for victim in (task, *steps):
                    victim.kill()

    def _tasks(self, *nodes: str) -> list[psutil.Process]:
        tasks = []
        for process in psutil.process_iter(["pid"]):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                is_task = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if is_task and environment.get("SLURMD_NODENAME") in nodes:
                    tasks.append(process)
        return tasks

    def stop(self) -> None:
        """Stop all jobs and daemons."""
        if "slurmctld -D" in self._daemons:
            self.run("scancel", "--user", getpass.getuser(), "--full", "--signal=KILL")
            self.run("scancel", "--user", getpass.getuser())
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_tasks(*self.nodes)  # tasks that were being cancelled when their slurmd exited
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on this cluster."""
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def queue(self) -> dict[str, str]:
        """Return the state of every unfinished job by id (`12_3` for a task of an array)."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def wait_for(self, condition: object, seconds: float = 60) -> None:
        """Wait until `condition()` is true."""
        deadline = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))
                raise AssertionError(f"not reached in {seconds} s; {self.queue()}\n{logs}")
            time.sleep(0.1)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}{command[-1][-2:]}.output").open("ab") as output:
            self._daemons[" ".join(command)] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )

    def _configuration(self) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        ports = _free_ports(1 + len(self.nodes))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.{10 + number} Port={port} CPUs={self._cores}"
            for number, (node, port) in enumerate(zip(self.nodes, ports[1:], strict=True))
        )
        own = [line.partition("=")[0] for line in self._settings.splitlines()]
        lines = [line for line in self._common(host, user, ports[0]).splitlines() if line.partition("=")[0] not in own]
        return "\n".join([*lines, self._settings, nodes, "PartitionName=main Nodes=ALL Default=YES State=UP", ""])

    def _common(self, host: str, user: str, port: int) -> str:
        return f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge.socket
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool.%n
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.%n.pid
SlurmctldLogFile={self.folder}/slurmctld.log
SlurmdLogFile={self.folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=10
KillWait=2
"""


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


def _free_ports(number: int) -> list[int]:
    """Return free ports below the ephemeral range, so that no outgoing connection takes one first."""
    ports: list[int] = []
    candidates = iter(random.SystemRandom().sample(range(15_000, 32_000), 1000))
    while len(ports) < number:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = next(candidates)
            probe.bind(("", port))
            ports.append(port)
    return ports
