"""The exceptions that a user can cause. Each message states the fact, the rule and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake: the command line prints the message and exits with code 2."""


class ConfigError(UserError):
    """The YAML or a `--set` override is invalid."""


class DataError(UserError):
    """Text, token files or a tokenizer are missing, damaged or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint or model directory is missing, incomplete, of another shape or of an unknown format."""


class ForestError(UserError):
    """An expert is unknown, unfinished, or does not fit the forest."""


class LaunchError(UserError):
    """A group cannot be started as requested."""


class WorkerLost(Exception):  # noqa: N818 (it names an event)
    """A worker process of a pool was killed; the work that it completed and recorded is kept."""


class GroupFailed(Exception):  # noqa: N818 (it names an event)
    """A group started and then failed; the message holds the end of its log."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not one of `known`, with the closest match if there is one."""
    choices = list(known)
    matches = difflib.get_close_matches(name, choices, n=1)
    question = f" Did you mean '{matches[0]}'?" if matches else ""
    return f"Unknown {what} '{name}'.{question} Choose one of {', '.join(choices)}."
