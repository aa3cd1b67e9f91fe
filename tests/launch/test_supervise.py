"""Groups side by side: what one's failure does to others, and which rank is asked why."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from btm_scale.launch.supervise import GroupCommand, Start, run_groups_in

from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.rank_log import read_failure

RANK = """
import sys, time
from pathlib import Path
from btm_scale.rank_log import rank_log
log, seconds, error = sys.argv[1:]
with rank_log(Path(log)):
    print("this is a rank's own line", flush=True)
    time.sleep(float(seconds))
    if error == "killed":
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    if error:
        raise RuntimeError(error)
"""
LOST = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3141"


class Shell:
    """Room for `slots` groups, each of which is a line of Python."""

    def __init__(self, slots: int, **lines: str | tuple[str, ...]) -> None:
        self.slots, self.lines, self.running, self.most = slots, lines, set[str](), 0

    def take(self, command: GroupCommand) -> Start | None:
        if len(self.running) == self.slots:
            return None
        self.running.add(command.name)
        self.most = max(self.most, len(self.running))
        lines = self.lines[command.name]
        return Start(
            tuple((sys.executable, "-c", line) for line in ([lines] if isinstance(lines, str) else lines))
        )

    def give_back(self, name: str) -> None:
        self.running.discard(name)


def commands(folder: Path, *names: str) -> list[GroupCommand]:
    return [GroupCommand(name, 1, (), folder / name / "log") for name in names]


def ranks(log: Path, *errors: tuple[float, str]) -> None:
    """Run ranks that end after so many seconds, each with its error."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(log), str(seconds), error],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(len(errors))},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank, (seconds, error) in enumerate(errors)
    ]
    for process in started:
        process.wait()


def test_one_groups_failure_stops_no_other_and_is_the_only_one_told(tmp_path: Path) -> None:
    done = tmp_path / "done"
    shell = Shell(
        2,
        bad="print('a line of the bad one'); raise SystemExit(3)",
        slow=f"import time, pathlib; time.sleep(1); pathlib.Path({str(done)!r}).touch()",
        late="pass",
    )
    seen: list[dict[str, str]] = []
    with pytest.raises(GroupFailed) as raised:
        run_groups_in(shell, commands(tmp_path, "bad", "slow", "late"), seen.append)
    assert done.exists()
    assert seen[-1] == {"bad": "failed", "slow": "done", "late": "done"}
    assert shell.most == 2
    assert "group 'bad' failed" in str(raised.value)
    assert "a line of the bad one" in str(raised.value)
    assert "slow" not in str(raised.value)


def test_a_group_that_has_lost_one_of_its_launchers_is_ended(tmp_path: Path) -> None:
    shell = Shell(1, two=("raise SystemExit(1)", "import time; time.sleep(600)"))
    begin = time.monotonic()
    with pytest.raises(GroupFailed):
        run_groups_in(shell, commands(tmp_path, "two"))
    assert time.monotonic() - begin < 300


def test_a_program_that_is_not_there_is_told(tmp_path: Path) -> None:
    class Absent(Shell):
        def take(self, command: GroupCommand) -> Start:
            return Start((("/nowhere/launcher",),))

    with pytest.raises(LaunchError, match="group 'one' cannot be started"):
        run_groups_in(Absent(1), commands(tmp_path, "one"))


def test_the_rank_that_failed_itself_is_asked_not_those_that_lost_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks(log, (0.0, LOST), (0.5, "the data of block 7 is torn"), (0.0, LOST))
    failure = read_failure(log)
    assert failure is not None
    assert (failure.rank, failure.ranks) == (1, 3)
    assert failure.error == "RuntimeError: the data of block 7 is torn"
    assert failure.log == tmp_path / "log.1"
    assert "this is a rank's own line" in failure.lines
    assert "rank 1 of 3" in str(failure)


def test_a_rank_that_was_killed_leaves_no_record_and_is_found_by_that(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks(log, (0.2, LOST), (0.2, LOST), (0.0, "killed"))
    failure = read_failure(log)
    assert failure is not None
    assert failure.rank == 2
    assert "ended without a word" in failure.error
    assert "this is a rank's own line" in failure.lines


def test_a_group_that_goes_well_again_has_no_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks(log, (0.0, "a first try"))
    assert read_failure(log) is not None
    ranks(log, (0.0, ""))
    assert read_failure(log) is None
