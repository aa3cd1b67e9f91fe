"""SECURITY.md: every threat has a test, and every verb and kind of input that strangers can reach has a threat."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()
HEADER = "| threat | what holds | test |"
# Words of the inputs and doors that strangers reach; each is in a row of the table.
REACHED = (
    "model directory",
    "tokenizer",
    "chat template",
    "adapter",
    "recipe",
    "token files",
    "text from a store",
    "engine behind `serve --backend`",
    "requests to `serve`",
    "web page",
    "working directory",
    "pickle",
    "archive",
    "safetensors",
    "index",
    "YAML",
    "JSON",
    "shared run",
    "secrets in a config",
    "secrets in the environment",
    "power cut",
    "kill -9",
    "disk",
)


def rows() -> list[list[str]]:
    table = TEXT.partition(HEADER)[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]


def test_every_threat_names_tests_that_exist() -> None:
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 3, row
        tests = re.findall(r"`(tests/[\w/]+\.py)`", row[2])
        assert tests, f"no test: {row[0]}"
        for test in tests:
            assert re.search(r"^def test_", (ROOT / test).read_text(), re.MULTILINE), test


def test_every_door_that_strangers_reach_is_in_the_table() -> None:
    threats = "\n".join(row[0] for row in rows())
    assert [word for word in REACHED if word not in threats] == []


def test_a_server_is_in_the_list_of_open_ports() -> None:
    ports = TEXT.partition("## Network")[2]
    assert "`serve`" in ports
    assert "rendezvous" in ports
