"""Groups on the hosts of a hostfile. Each host is a network namespace of this machine; two hosts share a link.

The two hosts of a group can reach only each other. There is no route between groups, so training that succeeds did not
need one.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cluster_run import cluster_values
from helpers.tiny_run import btm_scale, write_config

from btm_scale.forest.expert import read_expert
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow

STEPS = 4
Pair = tuple[str, str]


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Pair]]:
    """Two pairs of hosts, each connected by its own link. A host is named by its address."""
    if shutil.which("ip") is None:
        pytest.skip("needs the `ip` command: apt-get install iproute2")
    # Names that no other (or killed) run of these tests on this machine uses.
    taken = ip("netns", "list").stdout
    third = random.choice([number for number in range(250) if f".{number}." not in taken])
    pairs_of_hosts: list[Pair] = [
        (f"10.{200 + number}.{third}.1", f"10.{200 + number}.{third}.2") for number in range(2)
    ]
    try:
        for hosts in pairs_of_hosts:
            for host in hosts:
                added = ip("netns", "add", host)
                if added.returncode:
                    pytest.skip(f"network namespaces cannot be made here: {added.stderr.strip()}")
            first, second = hosts
            ends = [
                "link",
                "add",
                "wire",
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                "wire",
                "netns",
                second,
            ]
            assert ip(*ends).returncode == 0
            for host in hosts:
                for words in (
                    ("addr", "add", f"{host}/30", "dev", "wire"),
                    ("link", "set", "wire", "up"),
                    ("link", "set", "lo", "up"),
                ):
                    done = ip("-n", host, *words)
                    assert done.returncode == 0, done.stderr
        yield pairs_of_hosts
    finally:
        for host in (host for hosts in pairs_of_hosts for host in hosts):
            ip("netns", "del", host)


@pytest.fixture(scope="module")
def run(pairs: list[Pair], real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """From text to report by `--launcher deepspeed`, two experts at a time, each on both hosts of a pair."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "hostfile").write_text("".join(f"{host} slots=1\n" for hosts in pairs for host in hosts))
    launch = {
        "hostfile": "hostfile",
        "connect": ["ip", "netns", "exec", "{host}"],
        "environment": {"GLOO_SOCKET_IFNAME": "wire"},
    }
    values = cluster_values(real_text, steps=STEPS, experts=("python", "docs"), launch={"deepspeed": launch})
    write_config(folder / "run.yaml", values)
    run_dir = RunDir(folder / "run")
    btm_scale("run", folder / "run.yaml", "--launcher", "deepspeed", "--out", run_dir.root)
    return run_dir


def test_hosts_of_different_groups_cannot_reach_each_other(pairs: list[Pair]) -> None:
    for ours, others in (pairs, pairs[::-1]):
        for host in others:
            route = ip("-n", ours[0], "route", "get", host)
            assert route.returncode != 0
            assert "unreachable" in route.stderr
        assert ip("-n", ours[0], "route", "get", ours[1]).returncode == 0


def test_the_run_goes_from_text_to_report(run: RunDir) -> None:
    assert run.report.is_file()
    results = json.loads(run.results.read_text())
    assert {"ensemble", "expert:python", "expert:docs"} <= set(results["methods"])
    for model in ("seed", "python", "docs"):
        assert read_expert(run.model(model)).steps == STEPS


def test_each_group_had_its_own_hostfile(run: RunDir, pairs: list[Pair]) -> None:
    hosts = {
        model: tuple(line.split()[0] for line in (run.train(model) / "hostfile").read_text().splitlines())
        for model in ("python", "docs")
    }
    assert sorted(hosts.values()) == sorted(pairs)
