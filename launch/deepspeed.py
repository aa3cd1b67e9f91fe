"""Groups on the hosts of a hostfile: each group gets its own hostfile, port and `deepspeed` launcher.

The launcher reaches other hosts by pdsh over ssh. If `launch.deepspeed.connect` gives a command that runs another on a
host, one launcher per host is started instead, without ssh.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
from pathlib import Path

from btm_scale.config.launch import DeepSpeedConfig
from btm_scale.errors import LaunchError, first_few
from btm_scale.launch.hostfile import read_hostfile
from btm_scale.launch.ranks import IS_RANK
from btm_scale.launch.room import Room, Share
from btm_scale.launch.shutdown import SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, Start
from btm_scale.util.devices import Device, environment_of_ranks, environment_of_this_host
from btm_scale.util.files import make_directory, write_file
from btm_scale.util.logs import LEVEL

_SAFE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_SAFE_VALUE = re.compile(r"[\w@%+=:,./^-]*", re.ASCII)  # NCCL takes ^docker0 for all but docker0


_CLOSED_PORT = 1  # at which no host has listened for decades


class HostPool:
    """The hosts of a hostfile."""

    def __init__(self, config: DeepSpeedConfig, device: Device = "auto") -> None:
        self._config = config
        self._device = device
        self._slots = read_hostfile(config.hostfile)
        self._room = Room({host: range(number) for host, number in self._slots.items()})
        self._ports = list(range(config.ports[0], config.ports[1] + 1))
        self._taken: dict[str, tuple[tuple[Share[str, int], ...], int]] = {}
        self._files: dict[str, Path] = {}
        self._silent: set[str] = set()  # hosts that this machine cannot ask

    def take(self, command: GroupCommand) -> Start | None:
        """Return the launchers of a group; None while no slots or port are free.

        Raises LaunchError if the hosts can never hold the group, or a word is unsafe in a remote shell.
        """
        for word in command.arguments:
            if not _SAFE.fullmatch(word):
                raise LaunchError(
                    f"'{word}' is not safe in the shell of a remote host. Use letters, digits and @%+=:,./- only: "
                    "choose another --out."
                )
        for name, value in self._config.environment.items():
            if not _SAFE_VALUE.fullmatch(value):
                raise LaunchError(
                    f"launch.deepspeed.environment.{name}: '{value}' is not safe in the shell of a remote host. Use "
                    "letters, digits and @%+=:,./^- only."
                )
        self.require_room(command.name, command.ranks, command.colocated)
        if not self._ports:
            return None
        shares = self._room.take(command.ranks, command.colocated)
        if shares is None:
            return None
        port = self._free_port(shares[0].host)
        if port is None:
            self._room.give_back(shares)
            return None
        _require_reachable(command.name, shares)
        self._taken[command.name] = (shares, port)
        hostfile = command.log.with_name("hostfile")
        make_directory(hostfile.parent)
        write_file(hostfile, "".join(f"{share.host} slots={self._slots[share.host]}\n" for share in shares))
        ranks = {IS_RANK: "1", "OMP_NUM_THREADS": str(self._config.threads), "TOKENIZERS_PARALLELISM": "false"}
        ranks |= {LEVEL: os.environ[LEVEL]} if LEVEL in os.environ else {}
        ranks |= environment_of_ranks(self._device) | self._config.environment
        # Set on this machine only; other hosts may have the GPUs that this one lacks.
        own = ranks | environment_of_this_host(self._device) | {SUPERVISOR: str(os.getpid())}
        words = _launcher(shares, hostfile, port)
        if not self._config.connect:
            self._files[command.name] = _environment_file(ranks)
            own["DS_ENV_FILE"] = str(self._files[command.name])
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

    def require_room(self, name: str, ranks: int, colocated: int) -> None:
        """Raise LaunchError if the hosts can never hold a group of this size, or if its ranks could not connect."""
        shares = Room({host: range(number) for host, number in self._slots.items()}).take(ranks, colocated)
        if shares is not None:
            _require_reachable(name, shares)
        else:
            listed = [f"{host} with {number}" for host, number in self._slots.items()]
            raise LaunchError(
                f"{name} needs {ranks} slots, in multiples of {colocated} per host. The hostfile has "
                f"{first_few(listed, 'hosts', most=10)}: add hosts, or choose a smaller layout."
            )

    def _free_port(self, host: str) -> int | None:
        """Take a port at which no process of the host answers, or None until another group gives its port back.

        A host that this machine cannot reach, or for which a proxy answers, is not asked: the group tries another port
        if this one is taken.
        """
        for _ in range(len(self._ports)):
            port = self._ports.pop(0)
            if host in self._silent or not self._answers(host, port):
                return port
            self._ports.append(port)
        if self._taken:
            return None
        raise LaunchError(
            f"Other processes listen at every port of launch.deepspeed.ports ({len(self._ports)}) on {host}. A group "
            "needs a free one for its rendezvous: choose another range."
        )

    def _answers(self, host: str, port: int) -> bool:
        try:
            with socket.create_connection((host, port), timeout=1):
                pass
        except ConnectionRefusedError:
            return False
        except OSError:  # its name is unknown here, or a firewall drops the call
            self._silent.add(host)
            return False
        try:
            with socket.create_connection((host, _CLOSED_PORT), timeout=1):
                self._silent.add(host)  # a proxy or firewall answers in its place, at every port
                return False
        except OSError:
            return True

    def give_back(self, name: str) -> None:
        """Free the slots and the port of a group that has ended."""
        if file := self._files.pop(name, None):
            file.unlink(missing_ok=True)
        shares, port = self._taken.pop(name)
        self._room.give_back(shares)
        self._ports.append(port)  # reused last, so that its old connections are closed by then


def _require_reachable(name: str, shares: tuple[Share[str, int], ...]) -> None:
    """Raise LaunchError if a group spans several hosts and one is called localhost, which each of them calls itself."""
    own = [share.host for share in shares if share.host == "localhost" or share.host.startswith("127.")]
    if own and len(shares) > 1:
        raise LaunchError(
            f"{name} spans {first_few([share.host for share in shares], 'hosts')}, and {own[0]} is a different host on "
            "each of them. Ranks connect by the names in the hostfile: use the name by which the others reach it."
        )


def _launcher(shares: tuple[Share[str, int], ...], hostfile: Path, port: int) -> tuple[str, ...]:
    include = "@".join(f"{share.host}:{','.join(map(str, share.slots))}" for share in shares)
    return (
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", str(hostfile), "--include", include),
        *("--master_addr", shares[0].host if len(shares) > 1 else "127.0.0.1", "--master_port", str(port)),
    )


def _module(command: GroupCommand) -> tuple[str, ...]:
    return ("--no_local_rank", "--module", "btm_scale.cli", *command.arguments)


def _environment_file(variables: dict[str, str]) -> Path:
    """Write the variables that the launcher exports to every host: those of the user's own file, then ours.

    The user's may be secrets: only the owner may read the file, and it is not in the run's folder, which may be shared.
    """
    usual = Path.home() / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    lines = [line for line in usual.read_text().splitlines() if "=" in line] if usual.is_file() else []
    lines += [f"{name}={value}" for name, value in variables.items()]
    descriptor, path = tempfile.mkstemp(prefix="btm-scale-", suffix=".env")  # of mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
    return Path(path)
