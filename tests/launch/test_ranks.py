"""Which processes are ranks: those that our launchers start, and those that `--launcher env` names as such."""

from __future__ import annotations

import pytest

from btm_scale.cli.options import is_rank
from btm_scale.errors import LaunchError
from btm_scale.launch.ranks import IS_RANK, become_rank_of_environment, forget_foreign_rank

POD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}  # of a PyTorchJob
TORCHRUN = POD | {"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "7"}
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_TASK_ID": "sky-1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*TORCHRUN, IS_RANK):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_rank_of_a_pod_is_ignored_unless_it_is_asked_for(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    assert not is_rank("local")
    assert is_rank("env")
    environment.setenv(IS_RANK, "1")  # our launcher has set the others
    assert is_rank("local")


def test_a_command_forgets_a_rank_that_is_not_its_own() -> None:
    leaked = TORCHRUN | {"PATH": "/bin"}
    forget_foreign_rank(leaked)
    assert leaked == {"PATH": "/bin"}
    ours = TORCHRUN | {IS_RANK: "1"}
    forget_foreign_rank(ours)
    assert ours == TORCHRUN | {IS_RANK: "1"}


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (POD, ("1", "4", "0", "job-master-0", "23456")),
        (TORCHRUN, ("1", "4", "1", "job-master-0", "23456")),
        (SKYPILOT | {"MASTER_PORT": "8008"}, ("1", "2", "0", "10.0.0.1", "8008")),
    ],
    ids=["PyTorchJob", "torchrun", "SkyPilot"],
)
def test_a_rank_finds_its_place_in_the_environment(given: dict[str, str], place: tuple[str, ...]) -> None:
    environment = dict(given)
    become_rank_of_environment(environment)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert tuple(environment[name] for name in names) == place


def test_the_nodes_of_a_task_of_skypilot_choose_the_same_port() -> None:
    ports = set()
    for node in ("0", "1"):
        environment = SKYPILOT | {"SKYPILOT_NODE_RANK": node}
        become_rank_of_environment(environment)
        ports.add(environment["MASTER_PORT"])
    assert len(ports) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set. --launcher env is for processes"),
        ({"MASTER_PORT": "tcp://10.0.0.1:23456"}, "MASTER_PORT is 'tcp://10.0.0.1:23456'. It must be a number"),
        ({"RANK": "one"}, "RANK is 'one'. It must be a number"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE is 4. RANK must be less"),
    ],
)
def test_an_incomplete_or_wrong_place_is_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        become_rank_of_environment(POD | changes)
