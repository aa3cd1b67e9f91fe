"""Commands in forked processes of a process that has imported everything, so that each starts in milliseconds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from btm_scale.cli.app import main
from btm_scale.launch.local import free_port
from btm_scale.launch.supervise import GroupCommand, group_failure
from btm_scale.util.files import make_directory


def call(*arguments: object) -> int:
    """Run a verb in this process as the command line does; returns its exit code."""
    try:
        main([*map(str, arguments)])
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70  # what the command line would show as a traceback
    return 0


def forked(job: Callable[[], int], output: Path) -> int:
    """Start `job` in a forked process that ends with its result, and appends what it prints to a file; returns its
    process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 71
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = job()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a process; returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_forked(commands: Sequence[GroupCommand], on_poll: Callable[[dict[str, str]], None]) -> None:
    """A launcher: groups of one rank, one after the other, as forked processes. Raises GroupFailed like any other."""
    for command in commands:

        def rank(command: GroupCommand = command) -> int:
            place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(place | {"MASTER_PORT": str(free_port())})
            return call(*command.arguments)

        make_directory(command.log.parent)
        if ended(forked(rank, command.log)):
            raise group_failure([command])
