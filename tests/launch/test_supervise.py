"""Groups side by side: what one's failure does to others, and which rank is asked why."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from helpers.processes import command_line, is_alive

from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.launch import supervise
from btm_scale.launch.shutdown import REQUEUE
from btm_scale.launch.supervise import GroupCommand, Start, run_groups_in
from btm_scale.util.rank_log import read_failure

RANK = """
import sys, time
from pathlib import Path
from btm_scale.util.rank_log import rank_log
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
        return Start(tuple((sys.executable, "-c", line) for line in ([lines] if isinstance(lines, str) else lines)))

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


def test_a_failing_group_does_not_stop_the_others_and_is_the_only_one_reported(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("code", [1, 143], ids=["an error", "ended by its launcher"])
def test_a_group_that_marked_its_stop_is_stopped_whatever_code_its_launcher_returns(code: int, tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    command = GroupCommand("one", 1, ("train",), tmp_path / "one" / "log")
    line = f"import pathlib; pathlib.Path({str(command.log.parent / 'stopped')!r}).touch(); raise SystemExit({code})"
    with pytest.raises(GroupFailed, match="group 'one' was stopped"):
        run_groups_in(Shell(1, one=line), [command], seen.append)
    assert seen[-1] == {"one": "stopped"}
    with pytest.raises(GroupFailed, match="group 'one' failed"):  # the mark is that of the start before
        run_groups_in(Shell(1, one="raise SystemExit(1)"), [command], seen.append)


PORT_TAKEN = """
import pathlib
from btm_scale.errors import PortTaken
from btm_scale.util.rank_log import noting_failure
tries = pathlib.Path(FOLDER, "tries")
with tries.open("a") as file:
    file.write("x")
if len(tries.read_text()) < TRIES:
    with noting_failure(pathlib.Path(FOLDER, "log")):
        raise PortTaken("port 20001 is in use")
"""


@pytest.mark.parametrize(("tries", "works"), [(2, True), (9, False)])
def test_a_group_whose_port_was_taken_starts_again_with_another(tries: int, works: bool, tmp_path: Path) -> None:
    command = GroupCommand("one", 1, ("train",), tmp_path / "one" / "log")
    line = PORT_TAKEN.replace("FOLDER", repr(str(command.log.parent))).replace("TRIES", str(tries))
    if works:
        run_groups_in(Shell(1, one=line), [command])
    else:
        with pytest.raises(GroupFailed, match="port 20001 is in use"):
            run_groups_in(Shell(1, one=line), [command])
    assert len((command.log.parent / "tries").read_text()) == (tries if works else 4)


def test_a_group_that_saved_and_left_on_request_is_stopped_and_leaves_no_failure(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    command = GroupCommand("one", 1, ("train",), tmp_path / "one" / "log")
    with pytest.raises(GroupFailed, match="group 'one' was stopped; the same command resumes it"):
        run_groups_in(Shell(1, one=f"raise SystemExit({REQUEUE})"), [command], seen.append)
    assert seen[-1] == {"one": "stopped"}
    assert read_failure(command.log) is None


def test_errors_of_ranks_that_an_interruption_ended_are_not_failures(tmp_path: Path) -> None:
    command = GroupCommand("one", 1, ("train",), tmp_path / "one" / "log")
    rank = "import signal; signal.signal(signal.SIGTERM, lambda *_: 1 / 0)\n" + RANK.replace(
        "sys.argv[1:]", f"({str(command.log)!r}, '600', '')"
    )

    def interrupt(states: dict[str, str]) -> None:
        if command.log.is_file() and "own line" in command.log.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_groups_in(Shell(1, one=rank), [command], interrupt)
    assert "ZeroDivisionError" in command.log.read_text()
    assert read_failure(command.log) is None


def test_a_group_that_has_lost_one_of_its_launchers_is_ended(tmp_path: Path) -> None:
    shell = Shell(1, two=("raise SystemExit(1)", "import time; time.sleep(600)"))
    begin = time.monotonic()
    with pytest.raises(GroupFailed):
        run_groups_in(shell, commands(tmp_path, "two"))
    assert time.monotonic() - begin < 300


def test_a_group_whose_only_rank_was_killed_counts_as_failed_afterwards_too(tmp_path: Path) -> None:
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    command = GroupCommand("one", 1, ("train",), tmp_path / "one" / "log")
    with pytest.raises(GroupFailed, match="its host: exited, and no rank reported an error"):
        run_groups_in(Shell(1, one=killed), [command])
    failure = read_failure(command.log)
    assert failure is not None
    assert "no rank reported an error (killed" in failure.error
    run_groups_in(Shell(1, one="print('well')"), [command])
    assert read_failure(command.log) is None


def test_the_ranks_of_a_launcher_that_was_killed_are_ended(tmp_path: Path) -> None:
    """A rank that went on would hold the GPUs that the next group is given, and the model's lock."""
    launcher = f"""
import os, pathlib, signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "rank")!r}).write_text(str(rank.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(GroupFailed):
        run_groups_in(Shell(1, one=launcher), commands(tmp_path, "one"))
    pid = int((tmp_path / "rank").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


# A rank that takes a second to save, and launchers that hear no request to stop but as an order to end at once.
SAVING = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved").touch()
    raise SystemExit(85)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "begun").touch()
time.sleep(600)
"""
LAUNCHER = """
import os, signal, subprocess, sys
words, environment, own_session = {words}, {environment}, {own_session}
rank = subprocess.Popen(words, env=os.environ | environment, start_new_session=own_session)
signal.signal(signal.SIGTERM, lambda *_: (rank.kill(), sys.exit(1)))
sys.exit(rank.wait())
"""


def launcher_of(words: list[str], own_session: bool = False, **environment: str) -> list[str]:
    text = LAUNCHER.format(words=words, environment=environment, own_session=own_session)
    return [sys.executable, "-c", text]


@pytest.mark.parametrize("own_session", [False, True], ids=["as deepspeed's", "as mpirun's"])
def test_ranks_below_more_than_one_launcher_save_when_the_run_is_asked_to_stop_even_twice(
    own_session: bool, tmp_path: Path
) -> None:
    rank = [sys.executable, "-c", SAVING, str(tmp_path)]
    inner = launcher_of(rank, own_session, RANK="0")
    supervisor = f"""
from pathlib import Path
from btm_scale.launch.supervise import GroupCommand, Start, run_groups_in
class Room:
    def take(self, command): return Start(({tuple(launcher_of(inner))!r},))
    def give_back(self, name): pass
run_groups_in(Room(), [GroupCommand("one", 1, (), Path({str(tmp_path / "log")!r}))])
"""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    process = subprocess.Popen([sys.executable, "-c", supervisor], env=environment)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert process.wait(60) == REQUEUE
    assert (tmp_path / "saved").exists()


class AskedBetween(tuple[tuple[str, ...], ...]):
    """Processes of a group, with a request to stop after the first."""

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        for words in super().__iter__():
            yield words
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_to_stop_while_a_group_starts_leaves_no_process_behind(tmp_path: Path) -> None:
    sleep = (sys.executable, "-c", "import time; time.sleep(600)")

    class Room(Shell):
        def take(self, command: GroupCommand) -> Start:
            return Start(AskedBetween((sleep, sleep)))

    with pytest.raises(SystemExit):
        run_groups_in(Room(1), commands(tmp_path, "one"))
    left = [child for child in psutil.Process().children() if is_alive(child)]
    assert not [child for child in left if "time.sleep(600)" in command_line(child)]


def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    class Absent(Shell):
        def take(self, command: GroupCommand) -> Start:
            return Start((("/nowhere/launcher",),))

    with pytest.raises(LaunchError, match="group 'one' cannot be started"):
        run_groups_in(Absent(1), commands(tmp_path, "one"))


def test_a_limit_of_processes_is_not_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    monkeypatch.setattr(supervise.subprocess, "Popen", Mock(side_effect=refusal))
    with pytest.raises(GroupFailed, match="group 'one' cannot be started: Resource temporarily unavailable") as raised:
        run_groups_in(Shell(1, one="pass"), commands(tmp_path, "one"))
    assert not raised.value.mistake


def test_the_rank_that_failed_is_reported_not_those_that_lost_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks(log, (0.0, LOST), (0.5, "the data of block 7 is torn"), (0.0, LOST))
    failure = read_failure(log)
    assert failure is not None
    assert (failure.rank, failure.ranks) == (1, 3)
    assert failure.error == "RuntimeError: the data of block 7 is torn"
    assert failure.log == tmp_path / "log.1"
    assert "this is a rank's own line" in failure.lines
    assert "rank 1 of 3" in str(failure)


MISTAKEN = """
import sys
from pathlib import Path
from btm_scale.cli.exit_codes import exit_codes
from btm_scale.errors import DataError, GroupFailed
from btm_scale.util.rank_log import rank_log
with exit_codes(), rank_log(Path({log!r})):
    raise {error}
"""


def test_a_users_mistake_is_reported_once_for_all_groups_without_log_or_traceback(tmp_path: Path) -> None:
    both = commands(tmp_path, "one", "two")
    error = "DataError('There is no tokenizer.\\nPrepare the run first.')"
    lines = {command.name: MISTAKEN.format(log=str(command.log), error=error) for command in both}
    with pytest.raises(GroupFailed) as raised:
        run_groups_in(Shell(2, **lines), both)
    assert str(raised.value) == "groups 'one', 'two' failed: There is no tokenizer.\nPrepare the run first."
    assert raised.value.mistake
    assert "Traceback" not in both[0].log.read_text()
    assert both[0].log.read_text().count("There is no tokenizer.") == 1


def test_a_lock_of_another_group_is_reported_in_one_sentence_and_a_retry_may_succeed(tmp_path: Path) -> None:
    [command] = commands(tmp_path, "one")
    line = MISTAKEN.format(log=str(command.log), error="GroupFailed('another group is training in one')")
    with pytest.raises(GroupFailed, match=r"^group 'one' failed: another group is training in one$") as raised:
        run_groups_in(Shell(1, one=line), [command])
    assert not raised.value.mistake


def test_a_mistake_of_one_group_and_a_crash_of_another_are_reported_as_a_crash(tmp_path: Path) -> None:
    both = commands(tmp_path, "one", "two")
    line = MISTAKEN.format(log=str(both[0].log), error="DataError('There is no tokenizer.')")
    with pytest.raises(GroupFailed) as raised:
        run_groups_in(Shell(2, one=line, two="raise SystemExit(3)"), both)
    assert not raised.value.mistake


def test_a_killed_rank_is_identified_by_its_missing_record(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks(log, (0.2, LOST), (0.2, LOST), (0.0, "killed"))
    failure = read_failure(log)
    assert failure is not None
    assert failure.rank == 2
    assert "exited without an error" in failure.error
    assert "this is a rank's own line" in failure.lines


def test_a_group_that_succeeds_after_a_failure_has_no_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ranks(log, (0.0, "a first try"))
    assert read_failure(log) is not None
    ranks(log, (0.0, ""))
    assert read_failure(log) is None
