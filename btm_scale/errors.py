"""The exceptions that a user can cause, each with a message that says value, rule and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: the command line prints its message and exits with code 2."""


class ConfigError(UserError):
    """The YAML, or a `--set`, says something that no run can do."""


class DataError(UserError):
    """Text, token files or a tokenizer are missing, broken or do not belong together."""


class CheckpointError(UserError):
    """A checkpoint or model directory is missing, torn, of another shape or of an unknown format."""


class ForestError(UserError):
    """An expert is unknown, unfinished, or does not fit the forest."""


class LaunchError(UserError):
    """A group cannot be started as asked."""


class WorkerLost(Exception):  # noqa: N818 (it tells of an event)
    """A process of a pool was killed; what it had done and noted is there."""


class GroupFailed(Exception):  # noqa: N818 (it tells of an event)
    """A group started and ended with an error of its own; the message holds the end of its log."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not one of `known`, with the nearest that is, if any is near."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1)
    remedy = f"did you mean '{near[0]}'? Choose" if near else "choose"
    return f"no {what} is called '{name}'; {remedy} {', '.join(choices)}"
