"""Commands in forked processes of a process that has imported everything, so that each starts in milliseconds."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from btm_scale.cli.app import main
from btm_scale.launch.local import free_port
from btm_scale.launch.ranks import IS_RANK
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
            _become_rank()
            return call(*command.arguments)

        make_directory(command.log.parent)
        if ended(forked(rank, command.log)):
            raise group_failure([command])


class LastingGroup:
    """A launcher like `run_forked` whose one rank, forked once, stays in its group and carries out all commands."""

    def __init__(self, output: Path) -> None:
        self._connection, other = multiprocessing.Pipe()
        self._pid = forked(functools.partial(self._serve, other), output)
        other.close()

    def __call__(self, commands: Sequence[GroupCommand], on_poll: Callable[[dict[str, str]], None]) -> None:
        for command in commands:
            make_directory(command.log.parent)
            self._connection.send(command.arguments)
            if self._connection.recv():
                raise group_failure([command])

    def end(self) -> int:
        """Let the rank end; returns its exit code."""
        self._connection.close()
        return ended(self._pid)

    def _serve(self, commands: Connection) -> int:
        self._connection.close()
        _become_rank()
        _stay_in_one_group()
        while True:
            try:
                arguments = commands.recv()
            except EOFError:
                return 0
            commands.send(call(*arguments))


def _become_rank() -> None:
    place = {IS_RANK: "1", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_port())})


def _stay_in_one_group() -> None:
    """Let the commands of this rank, which all have one layout, join a group once and never leave it."""
    from btm_scale.distributed.group import ExpertGroup
    from btm_scale.run import worker

    groups: list[ExpertGroup] = []

    @contextmanager
    def joined(config: Any, run: Any, layout_of: Any, *, records: bool = False) -> Iterator[Any]:
        config = worker._resolved(config, run, records)
        layout = layout_of(config)
        if not groups:
            groups.append(ExpertGroup.join(layout, config.launch.device).in_precision(layout.precision))
        assert groups[0].layout == layout
        yield groups[0], config

    worker._joined = joined
