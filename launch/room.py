"""Free slots per host: the hosts of a hostfile, the GPUs of this machine, or the nodes of a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Host = TypeVar("Host", bound=Hashable)
Slot = TypeVar("Slot")


@dataclass(frozen=True)
class Share(Generic[Host, Slot]):
    """The slots of one host that a group has taken."""

    host: Host
    slots: tuple[Slot, ...]


class Room(Generic[Host, Slot]):
    """Hosts indexed by their number of free slots, so that the time does not grow with the number of hosts."""

    def __init__(self, slots: Mapping[Host, Sequence[Slot]]) -> None:
        self._all = {host: tuple(own) for host, own in slots.items()}
        self._most = max(map(len, self._all.values()), default=0)
        self._free = self._all.copy()
        self._hosts: dict[int, dict[Host, None]] = defaultdict(dict)  # ordered sets, by the number of free slots
        for host, own in self._all.items():
            self._hosts[len(own)][host] = None

    def take(
        self, ranks: int, colocated: int = 1, *, whole_hosts: bool = False
    ) -> tuple[Share[Host, Slot], ...] | None:
        """Take slots for a group, on the single host that it fills best or on as few as possible; None without room.

        Each `colocated` consecutive ranks stay on one host. With `whole_hosts`, a group that fits a host never spans
        two, and a larger one does not share its hosts.
        """
        chosen = self._one_host(ranks)
        if not chosen and not (whole_hosts and ranks <= self._most):
            chosen = self._several_hosts(ranks, colocated, whole_hosts)
        if not chosen:
            return None
        shares = tuple(Share(host, self._free[host][:number]) for host, number in chosen.items())
        for share in shares:
            self._set(share.host, self._free[share.host][len(share.slots) :])
        return shares

    def give_back(self, shares: Sequence[Share[Host, Slot]]) -> None:
        """Free the slots of a group."""
        for share in shares:
            free = {*self._free[share.host], *share.slots}
            self._set(share.host, tuple(slot for slot in self._all[share.host] if slot in free))

    def could_take(self, ranks: int, colocated: int = 1) -> bool:
        """Return whether there is room for a group when no other runs."""
        return Room(self._all).take(ranks, colocated) is not None

    def _one_host(self, ranks: int) -> dict[Host, int]:
        for number in range(ranks, self._most + 1):
            for host in self._hosts[number]:
                return {host: ranks}
        return {}

    def _several_hosts(self, ranks: int, colocated: int, whole_hosts: bool) -> dict[Host, int]:
        chosen: dict[Host, int] = {}
        for number in range(self._most, 0, -1):
            for host in self._hosts[number]:
                if whole_hosts and number < len(self._all[host]):
                    continue
                taken = min(ranks, number) // colocated * colocated
                if taken:
                    chosen[host] = taken
                    ranks -= taken
                if not ranks:
                    return chosen
        return {}

    def _set(self, host: Host, free: tuple[Slot, ...]) -> None:
        del self._hosts[len(self._free[host])][host]
        self._free[host] = free
        self._hosts[len(free)][host] = None
