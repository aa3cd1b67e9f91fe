"""Groups on the hosts of a hostfile: each group gets its own hostfile, port and `deepspeed` launcher.

The launcher reaches other hosts by pdsh over ssh. If `launch.deepspeed.connect` gives a command that runs another on a
host, one launcher per host is started instead, without ssh.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from btm_scale.config.launch import DeepSpeedConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.room import Room, Share
from btm_scale.launch.shutdown import SUPERVISOR
from btm_scale.launch.supervise import GroupCommand, Start
from btm_scale.util.bounded_json import read_bounded
from btm_scale.util.devices import Device, environment_of_ranks, environment_of_this_host
from btm_scale.util.files import make_directory, write_file
from btm_scale.util.logs import LEVEL

_HOST = re.compile(r"(\S+)\s+slots\s*=\s*([0-9]{1,5})")
_SAFE = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_SAFE_VALUE = re.compile(r"[\w@%+=:,./^-]*", re.ASCII)  # NCCL takes ^docker0 for all but docker0


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
        if not self._room.could_take(command.ranks, command.colocated):
            raise LaunchError(
                f"{command.name} needs {command.ranks} slots, in multiples of {command.colocated} per host. The "
                f"hostfile has {', '.join(f'{host} with {number}' for host, number in self._slots.items())}: "
                "add hosts, or choose a smaller layout."
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

    def give_back(self, name: str) -> None:
        """Free the slots and the port of a group that has ended."""
        if file := self._files.pop(name, None):
            file.unlink(missing_ok=True)
        shares, port = self._taken.pop(name)
        self._room.give_back(shares)
        self._ports.append(port)  # reused last, so that its old connections are closed by then


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


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots by host, in the order of the file: lines of `HOST slots=N`, with # for comments.

    Raises LaunchError if the file is missing or empty, a line has another form, a name contains one of DeepSpeed's
    separators, or a host is listed twice.
    """
    try:
        lines = read_bounded(path).decode("utf-8").splitlines()
    except ValueError as error:
        raise LaunchError(f"{path} is not a hostfile: {error}. Write lines of `HOST slots=N`.") from None
    except OSError as error:
        raise LaunchError(
            f"No hostfile at {path} ({error.strerror}). Set launch.deepspeed.hostfile, or use --launcher local."
        ) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOST.fullmatch(text)
        if match is None or int(match[2]) == 0:
            raise LaunchError(f"{path}, line {number}: '{text:.200}' is not a host. Write it as `HOST slots=N`.")
        if not {":", "@"}.isdisjoint(match[1]):
            raise LaunchError(
                f"{path}, line {number}: '{match[1]}' cannot name a host. ':' and '@' are separators of DeepSpeed's "
                "launcher: give the host a name in /etc/hosts, or with its user in ssh's config."
            )
        if match[1] in slots:
            raise LaunchError(
                f"{path}, line {number}: host '{match[1]}' is listed twice. Give all its slots in one line."
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise LaunchError(f"{path} lists no host. Write a line `HOST slots=N` for each.")
    return slots
