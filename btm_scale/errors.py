"""The exceptions that a user can cause. Each message states the fact, the rule and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A user's mistake: the command line prints the message and exits with code 2."""


class ConfigError(UserError):
    """The YAML or a `--set` override is invalid."""


class DataError(UserError):
    """Text, token files or a tokenizer are missing, damaged or inconsistent."""


class CheckpointError(UserError):
    """A checkpoint or model directory is missing, incomplete, of another shape or of an unknown format."""


class UnsupportedModelError(CheckpointError):
    """A model of a family, or with a setting, that Megatron-core does not compute here."""


class ForestError(UserError):
    """An expert is unknown, unfinished, or does not fit the forest."""


class LaunchError(UserError):
    """A group cannot be started as requested."""


class NoUsableGpuError(LaunchError):
    """SLURM gave GPUs to this process, and none works on this host: another host may be better."""


class WorkerLost(Exception):  # noqa: N818 (it names an event)
    """A worker process of a pool was killed; the work that it completed and recorded is kept."""


class GroupFailed(Exception):  # noqa: N818 (it names an event)
    """A group started and then failed. The message has the error, and the end of the log if the error needs it.

    `mistake`: whether each failure is a mistake of the user, which a retry would repeat.
    """

    def __init__(self, message: str, *, mistake: bool = False) -> None:
        super().__init__(message)
        self.mistake = mistake


class PortTaken(GroupFailed):
    """Another process listens on the port at which a group was to rendezvous; with another port it can start."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not one of `known`, with the closest match if there is one."""
    choices = list(known)
    if not choices:
        return f"Unknown {what} '{name}'. There is none to choose from."
    return f"Unknown {what} '{name}'.{near_match(name, choices)} Choose one of {', '.join(choices)}."


def few_names(names: Iterable[str], what: str) -> str:
    """Return the first of sorted names in quotes: "'a', 'b', 'c' and 7 more tensors"."""
    return first_few([f"'{name}'" for name in sorted(names)], what)


def first_few(items: Sequence[str], what: str, *, most: int = 3) -> str:
    """Return up to `most` items as a list in a sentence, followed by the number of the others: "a, b and 7 more"."""
    shown, others = items[:most], len(items) - most
    return f"{', '.join(shown)} and {others} more {what}" if others > 0 else ", ".join(shown)


def near_match(name: str, choices: Sequence[str]) -> str:
    """Return ` Did you mean 'x'?` with the closest choice in any case, or an empty string if none is close."""
    by_folded = {choice.casefold(): choice for choice in choices}
    matches = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean '{by_folded[matches[0]]}'?" if matches else ""
