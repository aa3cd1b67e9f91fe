"""A hostfile in the usual format, and room for groups on its hosts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from btm_scale.errors import LaunchError

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")


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
        found = _LINE.fullmatch(text)
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


@dataclass(frozen=True)
class Share:
    """A host's slots that one group has taken."""

    host: str
    slots: tuple[int, ...]


class HostRoom:
    """Which slots of which hosts are free."""

    def __init__(self, slots: Mapping[str, int]) -> None:
        self._all = dict(slots)
        self._free = {host: list(range(number)) for host, number in slots.items()}

    def take(self, name: str, ranks: int, colocated: int) -> tuple[Share, ...] | None:
        """Slots for a group: on the one host that it fills best, or else on as few as there are.

        Every `colocated` consecutive ranks stay on one host. None if there is no room now; raises LaunchError if there
        never will be.
        """
        if self._choose(ranks, colocated, self._all) is None:
            raise LaunchError(
                f"{name} needs {ranks} slots, {colocated} at a time on one host; the hostfile has "
                f"{', '.join(f'{host} with {number}' for host, number in self._all.items())}; "
                "add hosts, or choose a smaller layout"
            )
        chosen = self._choose(ranks, colocated, {host: len(free) for host, free in self._free.items()})
        if chosen is None:
            return None
        shares = []
        for host, number in chosen.items():
            shares.append(Share(host, tuple(self._free[host][:number])))
            del self._free[host][:number]
        return tuple(shares)

    def give_back(self, shares: tuple[Share, ...]) -> None:
        """These slots are free again."""
        for share in shares:
            self._free[share.host] = sorted([*self._free[share.host], *share.slots])

    @staticmethod
    def _choose(ranks: int, colocated: int, free: Mapping[str, int]) -> dict[str, int] | None:
        enough = [host for host, number in free.items() if number >= ranks]
        if enough:
            return {min(enough, key=lambda host: free[host]): ranks}
        chosen: dict[str, int] = {}
        for host in sorted(free, key=lambda host: -free[host]):
            number = min(ranks, free[host]) // colocated * colocated
            if number:
                chosen[host] = number
                ranks -= number
        return chosen if ranks == 0 else None
