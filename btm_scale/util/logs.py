"""Where log messages go: to a person at a terminal, or into a file with time stamps; always by stderr.

Every module logs to `logging.getLogger(__name__)`. Programs that import btm_scale configure logging themselves; the
command line and the ranks that it starts call `set_up_logging`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping

from btm_scale.util.secrets import masked
from btm_scale.util.terminal import printable

# The environment variable that has the level; ranks inherit it from the command that starts their group.
LEVEL = "BTM_SCALE_LOG_LEVEL"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# At every import Megatron-core warns which optional packages it works without.
_EXPECTED_WARNINGS = ("Transformer Engine and Apex", "Apex is not installed")
_OURS = "btm_scale"


def set_level(name: str) -> None:
    """Choose the level (debug, info, warning or error) of this process and of those that it starts."""
    os.environ[LEVEL] = name


def set_up_logging(model: str | None = None) -> None:
    """Send the messages of btm_scale to stderr, from the level in the environment variable BTM_SCALE_LOG_LEVEL on.

    A terminal gets rich's columns. Anything else gets one line per message with time and level; in a rank of a group
    the line names the rank, and the `model` where it is given. Call it again after stderr was redirected.
    """
    level = _LEVELS.get(os.environ.get(LEVEL, "").lower(), logging.INFO)
    logger = logging.getLogger(_OURS)
    for handler in logger.handlers[:]:
        if not isinstance(handler, logging.NullHandler):
            logger.removeHandler(handler)
    prefix = rank_prefix(os.environ, model)
    logger.addHandler(_rich_handler(prefix) if sys.stderr.isatty() else _plain_handler(prefix))
    logger.setLevel(level)
    _quiet_libraries(verbose=level == logging.DEBUG)


def rank_prefix(environment: Mapping[str, str], model: str | None = None) -> str:
    """Return `[rank 3] ` or `[MODEL rank 3] ` for a rank of a group, and nothing for any other process."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return ""
    return f"[{model} rank {environment['RANK']}] " if model else f"[rank {environment['RANK']}] "


class _Stderr:
    """The stderr of the moment. While a live table is drawn it is one that writes above the table."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


class _Formatter(logging.Formatter):
    """Formats a message with control characters escaped and secrets masked: names and errors may hold both."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(printable(super().format(record)))


def _rich_handler(prefix: str) -> logging.Handler:
    from rich.console import Console
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    console = Console(file=_Stderr(), force_terminal=True)  # type: ignore[arg-type]
    handler = RichHandler(
        console=console, show_path=False, highlighter=NullHighlighter(), log_time_format="%H:%M:%S", markup=False
    )
    handler.setFormatter(_Formatter(f"{_verbatim(prefix)}%(message)s"))
    return handler


def _plain_handler(prefix: str) -> logging.Handler:
    handler = logging.StreamHandler(_Stderr())
    handler.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {_verbatim(prefix)}%(message)s"))
    return handler


def _verbatim(prefix: str) -> str:
    return prefix.replace("%", "%%")


def _quiet_libraries(*, verbose: bool) -> None:
    """Unless `verbose`: only errors of Megatron-core, and none of its warnings here and in processes started from here.

    DeepSpeed's logger starts at the level of warnings by itself.
    """
    if verbose:
        return
    logging.getLogger("megatron").setLevel(logging.ERROR)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
        others = os.environ.get("PYTHONWARNINGS")
        if message not in (others or ""):
            os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [others, f"ignore:{message}"]))
