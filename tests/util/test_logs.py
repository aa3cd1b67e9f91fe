from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from btm_scale.util.logs import LEVEL, rank_prefix

MESSAGES = (
    "import logging, sys\nfrom btm_scale.util.logs import set_up_logging\nset_up_logging(*sys.argv[1:])\n"
    "logger = logging.getLogger('btm_scale.run.pipeline')\n"
    "logger.debug('a detail')\nlogger.info('a \\x1b[2J name')\nlogger.warning('trouble')\n"
    "logging.getLogger('megatron.core').warning('a library')\n"
)


def own(**environment: str) -> dict[str, str]:
    """The environment without the rank and the level that another test of this process has left there."""
    return {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", LEVEL)
    } | environment


def logged(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MESSAGES, *arguments],
        env=own(**environment),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr


def test_a_log_file_has_time_and_level_in_every_line_and_no_control_characters() -> None:
    first, second = logged().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO a \\x1b\[2J name", first)
    assert second.endswith(" WARNING trouble")


@pytest.mark.parametrize(("level", "lines"), [("warning", 1), ("info", 2), ("debug", 4), ("", 2)])
def test_the_level_comes_from_the_environment_and_so_reaches_ranks(level: str, lines: int) -> None:
    assert len(logged(**{LEVEL: level}).splitlines()) == lines


def test_a_rank_says_which_it_is() -> None:
    assert " INFO [rank 3] a " in logged(RANK="3", WORLD_SIZE="4")
    assert " INFO [law rank 3] a " in logged("law", RANK="3", WORLD_SIZE="4")
    assert rank_prefix({"RANK": "3"}) == "", "an operator's own RANK makes no group"


def test_a_terminal_gets_columns() -> None:
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", MESSAGES], stderr=theirs, env=own(NO_COLOR="1"), check=True)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert re.search(r"\d\d:\d\d:\d\d\S* \S*INFO +a \\x1b\[2J name", text)
    assert re.search(r"WARNING +trouble", text)


def test_messages_come_above_a_live_table() -> None:
    code = (
        "from rich.live import Live\nfrom rich.console import Console\n"
        "with Live('the table', console=Console(stderr=True), auto_refresh=False) as live:\n"
        "    " + MESSAGES.replace("\n", "\n    ")
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=own(NO_COLOR="1"), check=True)
    os.close(theirs)
    text = os.read(ours, 10_000).decode()
    os.close(ours)
    assert text.index("trouble") < text.rindex("the table")


def test_a_program_that_imports_btm_scale_sees_no_message_and_no_handler() -> None:
    code = (
        "import logging\nimport btm_scale\nlogging.getLogger('btm_scale.run').error('trouble')\n"
        "assert not logging.getLogger().handlers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
