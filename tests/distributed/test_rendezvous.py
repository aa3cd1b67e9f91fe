from __future__ import annotations

import ipaddress
import json
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

from btm_scale.distributed import rendezvous
from btm_scale.distributed.rendezvous import await_name, is_loopback, listening_socket
from btm_scale.errors import LaunchError, PortTaken
from btm_scale.launch.local import free_port


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks reports of its group."""
    folder = tmp_path_factory.mktemp("group")
    run_script(Path(__file__).with_name("describe_group.py"), str(folder), folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_a_group_on_one_host_listens_on_loopback_only(described: list[dict[str, Any]]) -> None:
    listening = [address for rank in described for address in rank["listening"]]
    assert listening, "the ranks of a group listen for each other"
    assert all(ipaddress.ip_address(address).is_loopback for address in listening), listening


@pytest.mark.slow
def test_process_groups_of_the_same_ranks_are_one(described: list[dict[str, Any]]) -> None:
    """Megatron-core creates two dozen, with one or no timeout."""
    for rank, own in enumerate(described):
        groups = Counter(map(tuple, own["groups"]))
        assert groups.keys() == {(rank,), (0, 1)}
        assert max(groups.values()) <= 2


@pytest.mark.slow
def test_every_rank_gets_what_the_first_one_decides(described: list[dict[str, Any]]) -> None:
    """A rank that looks for missing scores after the first one has written some would else skip a collective."""
    assert [own["decided"] for own in described] == [0, 0]


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)],
)
def test_loopback_addresses_are_known_by_what_they_are(address: str, loopback: bool) -> None:
    assert is_loopback(address) == loopback


def test_a_store_listens_on_its_own_address_only() -> None:
    port = free_port()
    with listening_socket("127.0.0.1", port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_a_host_whose_own_name_is_a_loopback_address_can_be_reached_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_debian_does(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", as_debian_does)
    with listening_socket("node-1", 0) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_an_address_or_port_that_cannot_be_used_is_reported() -> None:
    with pytest.raises(LaunchError, match="is not an address of this host"):
        listening_socket("192.0.2.1", 29500)
    with listening_socket("127.0.0.1", 0) as taken, pytest.raises(PortTaken, match="is in use"):
        listening_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(LaunchError, match=r"Cannot resolve MASTER_ADDR=no-such-host\.invalid"):
        listening_socket("no-such-host.invalid", 29500)


def test_a_name_that_is_published_after_the_ranks_have_started_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing = iter([socket.gaierror(socket.EAI_NONAME, "Name or service not known")] * 3)

    def resolve(name: str, port: object) -> None:
        for error in missing:
            raise error

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: None)
    await_name("job-master-0", 60)
    assert caplog.text.count("MASTER_ADDR=job-master-0 does not resolve yet (Name or service not known)") == 1
    missing = iter([socket.gaierror(socket.EAI_NONAME, "Name or service not known")] * 3)
    with pytest.raises(LaunchError, match="Cannot resolve MASTER_ADDR=job-master-0"):
        await_name("job-master-0", -1)
