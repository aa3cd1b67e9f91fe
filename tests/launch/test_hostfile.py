"""Hostfiles, and which group gets which slots."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from btm_scale.config.launch import DeepSpeedConfig
from btm_scale.errors import LaunchError
from btm_scale.launch.deepspeed import HostPool
from btm_scale.launch.hostfile import read_hostfile
from btm_scale.launch.supervise import GroupCommand
from btm_scale.util.logs import LEVEL


def written(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_has_one_host_per_line(tmp_path: Path) -> None:
    text = "# my cluster\nworker-0 slots=8\n\nworker-1  slots = 4  # the old one\n"
    assert read_hostfile(written(tmp_path, text)) == {"worker-0": 8, "worker-1": 4}


@pytest.mark.parametrize(
    ("content", "hosts"),
    [
        (b"\xef\xbb\xbfn1 slots=8\r\nn2 slots=8\r\n", {"n1": 8, "n2": 8}),
        ("n1 slots=8\nn2 slots=8\n".encode("utf-16"), {"n1": 8, "n2": 8}),
        (b"n1 slots=8 # caf\xe9\rn2\tslots=8", {"n1": 8, "n2": 8}),
        (b"n[01-03,07] slots=8\n", {f"n{number}": 8 for number in ("01", "02", "03", "07")}),
        (
            b"ddp-0.ddp.ml.svc.cluster.local slots=2\n10.0.0.7 slots=2",
            dict.fromkeys(["ddp-0.ddp.ml.svc.cluster.local", "10.0.0.7"], 2),
        ),
        (b"a[1-2]-ib,b[9-10]x[1,3] slots=2", dict.fromkeys(["a1-ib", "a2-ib", "b9x1", "b9x3", "b10x1", "b10x3"], 2)),
    ],
    ids=["BOM", "UTF-16", "a comment in Latin-1", "a list", "pods", "several lists"],
)
def test_a_hostfile_may_come_from_any_editor_and_have_lists(
    content: bytes, hosts: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_bytes(content)
    assert read_hostfile(tmp_path / "hostfile") == hosts


def test_bytes_outside_of_comments_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(b"n1 slots=8\ncaf\xe9 slots=8\n")
    with pytest.raises(LaunchError, match="line 2 is not UTF-8"):
        read_hostfile(tmp_path / "hostfile")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no host"),
        ("a slots=8 max_slots=9", "line 1: 'max_slots' is not an option here"),
        ("a slots=8 port=2222", "'port' is not an option here"),
        ("a slots=2 slots=3", "'a slots=2 slots=3' is not a host"),
        ("n[3-1] slots=8", r"'\[3-1\]' is not a list of numbers"),
        ("n[1-999999999] slots=8", "is not a list of numbers"),
        ("n[1-9999]-[1-9999] slots=8", "more than 100,000 hosts"),
        ("n[a-b] slots=8", r"'n\[a-b\]' cannot name a host"),
        ("n[1-2] slots=8\nn2 slots=8", "line 2: host 'n2' is listed twice"),
        ("worker-0\n", r"line 1: 'worker-0' is not a host"),
        ("a slots=2\nb slots=0", "line 2"),
        ("a slots=2\na slots=2", "'a' is listed twice"),
        ("n1 slots=2\nN1 slots=2", "line 2: host 'N1' is listed twice"),
        ("fe80::1 slots=8", "'fe80::1' cannot name a host"),
        ("a slots=8\nme@b slots=8", "line 2: 'me@b' cannot name a host"),
        ("a slots=8\nb lots=8", "line 2: 'lots' is not an option here"),
    ],
)
def test_an_invalid_hostfile_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=message):
        read_hostfile(written(tmp_path, text))


def test_a_missing_hostfile_is_reported(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"No hostfile at .*Set launch\.deepspeed\.hostfile"):
        read_hostfile(tmp_path / "absent")


def test_groups_that_run_at_once_have_different_slots_and_ports(tmp_path: Path) -> None:
    hosts = written(tmp_path, "n1 slots=4\nn2 slots=4\n")
    config = DeepSpeedConfig(hostfile=hosts, connect=("ssh", "-tt", "{host}"), ports=(30000, 30010))
    pool = HostPool(config)
    starts, included, ports = [], [], []
    for name in ("math", "code", "law"):
        start = pool.take(GroupCommand(name, 4 if name == "law" else 2, ("train",), tmp_path / name / "log"))
        if start is not None:
            starts.append(start)
            words = start.processes[0]
            included.append(words[words.index("--include") + 1])
            ports.append(words[words.index("--master_port") + 1])
            assert words[:3] == ("ssh", "-tt", included[-1].split(":")[0])
    assert included == ["n1:0,1", "n1:2,3", "n2:0,1,2,3"]
    assert len(set(ports)) == 3
    assert (tmp_path / "math" / "hostfile").read_text() == "n1 slots=4\n"
    assert pool.take(GroupCommand("more", 1, ("train",), tmp_path / "more" / "log")) is None
    pool.give_back("code")
    assert pool.take(GroupCommand("more", 1, ("train",), tmp_path / "more" / "log")) is not None


def test_a_group_gets_no_port_at_which_another_process_listens(tmp_path: Path) -> None:
    hosts = written(tmp_path, "localhost slots=2\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        pool = HostPool(DeepSpeedConfig(hostfile=hosts, connect=("ssh", "{host}"), ports=(first, first + 1)))
        start = pool.take(GroupCommand("math", 1, ("train",), tmp_path / "math" / "log"))
        assert start is not None
        words = start.processes[0]
        assert words[words.index("--master_port") + 1] == str(first + 1)
        pool = HostPool(DeepSpeedConfig(hostfile=hosts, ports=(first, first)))
        with pytest.raises(LaunchError, match=r"Other processes listen at every port .*choose another range"):
            pool.take(GroupCommand("math", 1, ("train",), tmp_path / "math" / "log"))


def test_a_host_for_which_a_proxy_answers_at_every_port_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Proxied(socket.socket):
        """A connection that a proxy has accepted."""

    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Proxied())
    pool = HostPool(DeepSpeedConfig(hostfile=written(tmp_path, "a slots=2\n"), ports=(30000, 30001)))
    start = pool.take(GroupCommand("math", 1, ("train",), tmp_path / "math" / "log"))
    assert start is not None
    words = start.processes[0]
    assert words[words.index("--master_port") + 1] == "30000"


def test_a_group_that_can_never_fit_the_hosts_is_refused(tmp_path: Path) -> None:
    pool = HostPool(DeepSpeedConfig(hostfile=written(tmp_path, "a slots=3\nb slots=3\n")))
    with pytest.raises(LaunchError, match=r"wide needs 6 slots, in multiples of 2 per host.* a with 3, b with 3"):
        pool.take(GroupCommand("wide", 6, ("train",), tmp_path / "wide" / "log", colocated=2))


def test_by_default_one_launcher_reaches_all_hosts_of_its_group_by_pdsh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL, "debug")
    pool = HostPool(DeepSpeedConfig(hostfile=written(tmp_path, "n1 slots=2\nn2 slots=2\n"), environment={"A": "b"}))
    start = pool.take(GroupCommand("math", 4, ("train", "x.yaml"), tmp_path / "math" / "log"))
    assert start is not None
    [words] = start.processes
    # Even a group of one host is started on that host, never here by mistake.
    assert "--force_multi" in words
    assert words[-3:] == ("btm_scale.cli", "train", "x.yaml")
    exported = Path(start.environment["DS_ENV_FILE"]).read_text().splitlines()
    assert {"A=b", "OMP_NUM_THREADS=1", f"{LEVEL}=debug"} <= set(exported)


def test_the_users_own_variables_reach_no_file_of_the_run_and_no_command_line_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".deepspeed_env").write_text("HF_TOKEN=canary\n")
    monkeypatch.setenv("HOME", str(home))
    pool = HostPool(DeepSpeedConfig(hostfile=written(tmp_path, "n1 slots=2\nn2 slots=2\n")))
    start = pool.take(GroupCommand("math", 4, ("train", "x.yaml"), tmp_path / "run" / "math" / "log"))
    assert start is not None
    exported = Path(start.environment["DS_ENV_FILE"])
    assert "HF_TOKEN=canary" in exported.read_text()
    assert exported.stat().st_mode & 0o777 == 0o600
    assert all("canary" not in word for words in start.processes for word in words)
    assert all(b"canary" not in file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    pool.give_back("math")
    assert not exported.exists()


def test_an_argument_that_a_remote_shell_would_read_is_refused(tmp_path: Path) -> None:
    pool = HostPool(DeepSpeedConfig(hostfile=written(tmp_path, "n1 slots=2\n")))
    with pytest.raises(LaunchError, match="is not safe in the shell"):
        pool.take(GroupCommand("math", 1, ("train", "a; rm -rf ~ #"), tmp_path / "math" / "log"))


@pytest.mark.parametrize(("value", "refused"), [("^docker0,lo", False), ("", False), ("a b", True), ("$(id)", True)])
def test_a_value_that_a_remote_shell_would_read_is_refused(value: str, refused: bool, tmp_path: Path) -> None:
    hosts = written(tmp_path, "n1 slots=2\n")
    pool = HostPool(DeepSpeedConfig(hostfile=hosts, environment={"NCCL_SOCKET_IFNAME": value}))
    command = GroupCommand("math", 1, ("train",), tmp_path / "math" / "log")
    if refused:
        with pytest.raises(LaunchError, match=r"environment\.NCCL_SOCKET_IFNAME: .* is not safe in the shell"):
            pool.take(command)
    else:
        assert pool.take(command) is not None


@pytest.mark.parametrize("ports", [(30_499, 29_500), (0, 10), (65_000, 66_000)])
def test_an_invalid_range_of_ports_is_refused(ports: tuple[int, int]) -> None:
    """Without a port, no group would ever start."""
    with pytest.raises(ValidationError, match="is not a range of ports"):
        DeepSpeedConfig(ports=ports)


@pytest.mark.parametrize("first", ["localhost", "127.0.0.2"])
def test_a_group_spans_no_host_that_is_another_one_for_each_rank(first: str, tmp_path: Path) -> None:
    pool = HostPool(DeepSpeedConfig(hostfile=written(tmp_path, f"{first} slots=2\nn2 slots=2\n")))
    pool.require_room("math", 2, 1)
    for refused in (
        lambda: pool.require_room("law", 4, 1),
        lambda: pool.take(GroupCommand("law", 4, ("train",), tmp_path / "law" / "log")),
    ):
        with pytest.raises(LaunchError, match=f"law spans {first}, n2, and {first} is a different host on each"):
            refused()


def test_an_interface_of_gloo_is_named() -> None:
    DeepSpeedConfig(environment={"NCCL_SOCKET_IFNAME": "^docker0", "GLOO_SOCKET_IFNAME": "eth0"})
    with pytest.raises(ValidationError, match=r"Only NCCL leaves out interfaces by \^: name the one to use"):
        DeepSpeedConfig(environment={"GLOO_SOCKET_IFNAME": "^docker0"})
