"""Groups on the hosts of a hostfile: it is cut into one hostfile and one port a group, for a `deepspeed` launcher each.

The launcher reaches other hosts by pdsh over ssh, as it always does; or, where `launch.deepspeed.connect` says how a
command is run on a host, one launcher is started on each host of the group, and none needs ssh.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from btm_scale.config.launch import DeepSpeedConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.hostfile import HostRoom, Share, read_hostfile
from btm_scale.launch.local import accelerator
from btm_scale.launch.supervise import GroupCommand, Start
from btm_scale.util.processes import SUPERVISOR

_SAFE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_SAFE_VALUE = re.compile(r"[\w@%+=:,./^-]*", re.ASCII)  # NCCL takes ^docker0 for all but docker0


class HostPool:
    """The hosts of a hostfile."""

    def __init__(self, config: DeepSpeedConfig) -> None:
        self._config = config
        self._slots = read_hostfile(config.hostfile)
        self._room = HostRoom(self._slots)
        self._ports = list(range(config.ports[0], config.ports[1] + 1))
        self._taken: dict[str, tuple[tuple[Share, ...], int]] = {}

    def take(self, command: GroupCommand) -> Start | None:
        """The launchers of a group, if there are slots and a port for it."""
        for word in command.arguments:
            if not _SAFE.fullmatch(word):
                raise LaunchError(
                    f"'{word}' would pass through a shell on every host; it may have letters, digits and @%+=:,./- "
                    "only, so choose another --out"
                )
        for name, value in self._config.environment.items():
            if not _SAFE_VALUE.fullmatch(value):
                raise LaunchError(
                    f"launch.deepspeed.environment.{name}: '{value}' would pass through a shell on every host; it may "
                    "have letters, digits and @%+=:,./^- only"
                )
        if not self._ports:
            return None
        shares = self._room.take(command.name, command.ranks, command.colocated)
        if shares is None:
            return None
        port = self._ports.pop(0)
        self._taken[command.name] = (shares, port)
        hostfile = command.log.with_name("hostfile")
        hostfile.parent.mkdir(parents=True, exist_ok=True)
        hostfile.write_text("".join(f"{share.host} slots={self._slots[share.host]}\n" for share in shares))
        ranks = {"OMP_NUM_THREADS": str(self._config.threads), "TOKENIZERS_PARALLELISM": "false"}
        ranks |= self._config.environment
        # These reach only what runs on this machine; other hosts may have the GPUs that this one lacks.
        own = ranks | accelerator() | {SUPERVISOR: str(os.getpid())}
        words = self._launcher(command, shares, hostfile, port)
        if not self._config.connect:
            own["DS_ENV_FILE"] = str(_environment_file(hostfile.with_name("deepspeed_env"), ranks))
            return Start(((*words, "--force_multi", *_module(command)),), own)
        exports = ("env", *(f"{name}={value}" for name, value in ranks.items()))
        return Start(
            tuple(
                (
                    *(word.replace("{host}", share.host) for word in self._config.connect),
                    *exports,
                    *words,
                    "--no_ssh",
                    "--node_rank",
                    str(number),
                    *_module(command),
                )
                for number, share in enumerate(shares)
            ),
            own,
        )

    def give_back(self, name: str) -> None:
        """The group of this name has ended."""
        shares, port = self._taken.pop(name)
        self._room.give_back(shares)
        self._ports.append(port)  # the last to be used again: its old connections have gone by then

    def _launcher(self, command: GroupCommand, shares: tuple[Share, ...], hostfile: Path, port: int) -> tuple[str, ...]:
        include = "@".join(f"{share.host}:{','.join(map(str, share.slots))}" for share in shares)
        return (
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--hostfile", str(hostfile), "--include", include),
            *("--master_addr", shares[0].host, "--master_port", str(port)),
        )


def _module(command: GroupCommand) -> tuple[str, ...]:
    return ("--no_local_rank", "--module", "btm_scale.cli", *command.arguments)


def _environment_file(path: Path, variables: dict[str, str]) -> Path:
    """What the launcher exports to every host: the user's own file of this kind, and then ours."""
    usual = Path.home() / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines = [line for line in usual.read_text().splitlines() if "=" in line] if usual.is_file() else []
    lines += [f"{name}={value}" for name, value in variables.items()]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
