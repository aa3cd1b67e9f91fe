"""Groups on the hosts of a hostfile: each group gets its own hostfile, port and `deepspeed` launcher.

The launcher reaches other hosts by pdsh over ssh. If `launch.deepspeed.connect` says how to run a command on a host,
one launcher is started on each host of the group instead, and ssh is not needed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from btm_scale.config.launch import DeepSpeedConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.local import accelerator
from btm_scale.launch.room import Room, Share
from btm_scale.launch.shutdown import SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, Start
from btm_scale.util.files import make_directory, write_file
from btm_scale.util.logs import LEVEL

_HOST = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")
_SAFE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_SAFE_VALUE = re.compile(r"[\w@%+=:,./^-]*", re.ASCII)  # NCCL takes ^docker0 for all but docker0


class HostPool:
    """The hosts of a hostfile."""

    def __init__(self, config: DeepSpeedConfig) -> None:
        self._config = config
        self._slots = read_hostfile(config.hostfile)
        self._room = Room({host: range(number) for host, number in self._slots.items()})
        self._ports = list(range(config.ports[0], config.ports[1] + 1))
        self._taken: dict[str, tuple[tuple[Share[str, int], ...], int]] = {}

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
        if not self._room.could_take(command.ranks, command.colocated):
            raise LaunchError(
                f"{command.name} needs {command.ranks} slots, {command.colocated} at a time on one host; the hostfile "
                f"has {', '.join(f'{host} with {number}' for host, number in self._slots.items())}; "
                "add hosts, or choose a smaller layout"
            )
        if not self._ports:
            return None
        shares = self._room.take(command.ranks, command.colocated)
        if shares is None:
            return None
        port = self._ports.pop(0)
        self._taken[command.name] = (shares, port)
        hostfile = command.log.with_name("hostfile")
        make_directory(hostfile.parent)
        write_file(hostfile, "".join(f"{share.host} slots={self._slots[share.host]}\n" for share in shares))
        ranks = {"OMP_NUM_THREADS": str(self._config.threads), "TOKENIZERS_PARALLELISM": "false"}
        ranks |= {LEVEL: os.environ[LEVEL]} if LEVEL in os.environ else {}
        ranks |= self._config.environment
        # These reach only what runs on this machine; other hosts may have the GPUs that this one lacks.
        own = ranks | accelerator() | {SUPERVISOR: str(os.getpid())}
        words = _launcher(shares, hostfile, port)
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


def _launcher(shares: tuple[Share[str, int], ...], hostfile: Path, port: int) -> tuple[str, ...]:
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
    write_file(path, "".join(f"{line}\n" for line in lines))
    return path


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, in the file's order: lines of `HOST slots=N`, with # for comments.

    Raises LaunchError for a file that is missing or empty, a line of another kind, a name that DeepSpeed would take
    apart, or a host that stands twice.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise LaunchError(
            f"no hostfile at {path} ({error.strerror}); set launch.deepspeed.hostfile, or use --launcher local"
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _HOST.fullmatch(text)
        if found is None or int(found[2]) == 0:
            raise LaunchError(f"{path}, line {number}: '{text}' is not of the form `HOST slots=N`")
        if not {":", "@"}.isdisjoint(found[1]):
            raise LaunchError(
                f"{path}, line {number}: DeepSpeed's launcher takes ':' and '@' for separators, so '{found[1]}' cannot "
                "name a host; give it a name in /etc/hosts, or one with its user in ssh's config"
            )
        if found[1] in slots:
            raise LaunchError(f"{path}, line {number}: host '{found[1]}' stands twice; give all its slots in one line")
        slots[found[1]] = int(found[2])
    if not slots:
        raise LaunchError(f"{path} names no host; write a line `HOST slots=N` for each")
    return slots
