"""The systemd unit, the Dockerfile and the SLURM script of docs/serving.md: what they install and start exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers.in_process import refusal
from helpers.served_forest import Served
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def block(title: str) -> str:
    """The block of the page below a line."""
    page = (ROOT / "docs" / "serving.md").read_text()
    found = re.search(rf"^{title}.*?\n+```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def instructions(dockerfile: str) -> dict[str, list[str]]:
    """The arguments of each kind of line."""
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", dockerfile).splitlines():
        kind, _, rest = line.partition(" ")
        found.setdefault(kind, []).append(rest)
    return found


@pytest.fixture(scope="module")
def image() -> dict[str, list[str]]:
    return instructions(block("A Dockerfile"))


def refuse_missing_run(command: list[str], folder: Path) -> str:
    """Call the command with a run folder that does not exist: options and their values are checked before it is."""
    assert Path(command[0]).name in PROJECT["scripts"]
    return refusal(command[1], folder, *command[3:])


def test_the_image_has_a_python_that_the_package_supports(image: dict[str, list[str]]) -> None:
    (base,) = image["FROM"]
    version = re.fullmatch(r"python:([\d.]+)-slim", base)
    assert version
    assert version[1] in SpecifierSet(PROJECT["requires-python"])


def test_the_image_installs_what_exists_at_pinned_versions(image: dict[str, list[str]]) -> None:
    (copied,) = image["COPY"]
    source, target = copied.split()
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    installed = []
    for command in " && ".join(image["RUN"]).split(" && "):
        words = shlex.split(command)
        if words[:2] != ["pip", "install"]:
            continue
        assert words[words.index("-c") + 1] == f"{target}/constraints.txt"
        assert (ROOT / source / "constraints.txt").is_file()
        names = [word for word in words[2:] if not word.startswith("-") and not word.endswith("constraints.txt")]
        installed += [name.replace(target, PROJECT["name"]) for name in names]
    needed = []
    for requirement in map(Requirement, installed):
        needed.append(requirement)
        for extra in requirement.extras:
            needed += map(Requirement, PROJECT["optional-dependencies"][extra])
    assert {requirement.name for requirement in needed} >= {"torch", PROJECT["name"], "starlette", "uvicorn", "aiohttp"}
    for requirement in needed:
        if requirement.name != PROJECT["name"]:
            assert pins[requirement.name] in requirement.specifier, requirement


def test_the_image_and_the_unit_start_a_command_that_exists_with_its_options(
    image: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = re.findall(r"^ExecStart=(.*)$", block("A systemd unit"), re.MULTILINE)
    assert len(unit) == 1
    for command in (json.loads(image["ENTRYPOINT"][0]), shlex.split(unit[0])):
        assert "is not a run folder" in refuse_missing_run(command, tmp_path / "none")


def test_the_health_check_of_the_image_reports_whether_models_are_loaded(
    image: dict[str, list[str]], served: Served
) -> None:
    python, *arguments = json.loads(image["HEALTHCHECK"][0].partition("CMD ")[2])
    assert python == "python"

    def status(address: str) -> int:
        words = [word.replace("127.0.0.1:8000", address) for word in arguments]
        assert words != arguments
        return subprocess.run([sys.executable, *words], stderr=subprocess.DEVNULL, timeout=60).returncode

    assert status(served.url.removeprefix("http://")) == 0
    served.backend.is_ready = False
    try:
        assert status(served.url.removeprefix("http://")) == 1
    finally:
        served.backend.is_ready = True
    assert status("127.0.0.1:9") == 1


SERVER = """#!/bin/bash
echo "$@" > {folder}/arguments
trap 'sleep 0.3; echo > {folder}/drained; exit' TERM
echo > {folder}/started
while true; do sleep 0.05; done
"""


def test_the_job_waits_until_the_server_has_completed_its_requests(tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(block("A SLURM job"))
    server = tmp_path / "btm-scale"
    server.write_text(SERVER.format(folder=tmp_path))
    server.chmod(0o755)
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline().startswith("http://")
    while not (tmp_path / "started").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert (tmp_path / "drained").exists()
    arguments = shlex.split((tmp_path / "arguments").read_text())
    assert "is not a run folder" in refuse_missing_run(["btm-scale", *arguments], tmp_path / "none")
    key = tmp_path / "forest-key"
    assert len(key.read_text().strip()) == 32
    assert key.stat().st_mode & 0o077 == 0
