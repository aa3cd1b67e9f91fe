"""Which processes are ranks of a group, and where a rank finds its place if another program has started it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, MutableMapping

from btm_scale.errors import LaunchError

# Set by the launchers of btm-scale. Without it, RANK and its like are those of the pod or job in which a user works.
IS_RANK = "BTM_SCALE_RANK"
# torchrun, PyTorchJob and Ray Train set these for their ranks.
RANK_VARIABLES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "ROLE_RANK"),
        *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE"),
    }
)
_OF_LAUNCHERS = ("TORCHELASTIC_", "PET_")


def is_rank(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher of btm-scale has started this process as a rank."""
    return IS_RANK in environment and "RANK" in environment and "WORLD_SIZE" in environment


def without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables by which launchers tell a process its rank."""
    return {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(_OF_LAUNCHERS)
    }


def forget_foreign_rank(environment: MutableMapping[str, str]) -> None:
    """Remove the rank that another program has given to a process which is not a rank of a group."""
    if not is_rank(environment):
        for name in set(environment) - set(without_rank(environment)):
            del environment[name]


def become_rank_of_environment(environment: MutableMapping[str, str]) -> None:
    """Complete RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which another program has set.

    torchrun and Ray Train set all of them, PyTorchJob all but LOCAL_RANK, and SkyPilot names the nodes instead. Raises
    LaunchError if one is missing or not a number.
    """
    nodes = environment.get("SKYPILOT_NODE_IPS", "").split()
    if "RANK" not in environment and nodes and "SKYPILOT_NODE_RANK" in environment:
        task = environment.get("SKYPILOT_TASK_ID", "")
        environment["RANK"] = environment["SKYPILOT_NODE_RANK"]
        environment["WORLD_SIZE"] = environment.get("SKYPILOT_NUM_NODES", str(len(nodes)))
        environment["MASTER_ADDR"] = nodes[0]
        environment.setdefault("MASTER_PORT", str(20_000 + zlib.crc32(task.encode()) % 10_000))
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name, "").strip()
    ]
    if missing:
        raise LaunchError(
            f"{', '.join(missing)} is not set. --launcher env is for processes that torchrun, PyTorchJob, Ray Train or "
            "SkyPilot has started as ranks: start the command with one of them, or leave the option out."
        )
    environment.setdefault("LOCAL_RANK", "0")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not environment[name].strip().isdecimal():
            raise LaunchError(f"{name} is '{environment[name]:.60}'. It must be a number: correct what sets it.")
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= size:
        raise LaunchError(f"RANK is {rank} and WORLD_SIZE is {size}. RANK must be less: correct what sets them.")
