from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer
from helpers.tiny_run import tiny_values, write_config

from btm_scale.cli.app import parse
from btm_scale.cli.verb import Call
from btm_scale.launch.supervise import GroupCommand, Start, groups_in
from btm_scale.run.launcher_table import LAUNCHERS, Launcher
from btm_scale.run.launchers import launcher_named


class ToyPool:
    """One group at a time, which writes its arguments to its log."""

    def __init__(self) -> None:
        self._busy = False

    def take(self, command: GroupCommand) -> Start | None:
        if self._busy:
            return None
        self._busy = True
        return Start(((sys.executable, "-c", "import sys; print(*sys.argv[1:])", *command.arguments),))

    def give_back(self, name: str) -> None:
        self._busy = False


def test_a_launcher_needs_only_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(LAUNCHERS, "toy", Launcher("a toy cluster", lambda config: groups_in(ToyPool())))
    for verb in ("run", "train", "evaluate"):
        call = parse([verb, "PLACE", "--launcher", "toy"])
        assert isinstance(call, Call)
        assert call.arguments["launcher"] == "toy"
    config = write_config(tmp_path / "run.yaml", tiny_values(tmp_path))
    launcher = launcher_named("toy", config)
    assert launcher is not None
    commands = [GroupCommand(name, 1, ("train", name), tmp_path / name / "log") for name in ("math", "code")]
    states: list[dict[str, str]] = []
    launcher(commands, states.append)
    assert states[-1] == {"math": "done", "code": "done"}
    assert [command.log.read_text() for command in commands] == ["train math\n", "train code\n"]


def test_score_offers_only_launchers_that_identify_their_ranks() -> None:
    offered = {name for name in LAUNCHERS if _is_offered("score", name)}
    assert offered == {"local", "slurm", "env"}
    assert all(_is_offered("train", name) for name in LAUNCHERS)
    assert all(_is_offered(verb, name) == (name != "env") for verb in ("run", "evaluate") for name in LAUNCHERS)


def _is_offered(verb: str, launcher: str) -> bool:
    try:
        parse([verb, "PLACE", "--launcher", launcher])
    except typer.BadParameter:
        return False
    return True
