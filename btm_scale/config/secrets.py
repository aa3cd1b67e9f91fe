"""Secrets in a config are refused: run.yaml, job scripts, logs and command lines can be read by others."""

from __future__ import annotations

import shlex
from typing import Any

from btm_scale.util.secrets import is_secret_name, secrets_in, secrets_of_command

# Sections whose keys and texts are those of other programs.
_FREE = ("deepspeed",)


def refuse_secrets(values: Any) -> Any:
    """Return the values of a YAML. Raises ValueError with the path of each that looks like a secret, not with it."""
    paths = list(secrets_in(values, free=_FREE))
    if paths:
        raise ValueError("\n".join(f"{path}: {_REFUSAL}" for path in paths))
    return values


def no_secret_variables(variables: dict[str, str]) -> dict[str, str]:
    """Return environment variables. Raises ValueError for one with the name of a secret."""
    for name in filter(is_secret_name, variables):
        raise ValueError(f"{name} {_REFUSAL}")
    return variables


def no_secret_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return shell lines, or the words of a command. Raises ValueError for one that sets a secret."""
    for name in (*secrets_of_command(words), *(name for line in words for name in secrets_of_command(_split(line)))):
        raise ValueError(f"{name} {_REFUSAL}")
    return words


def _split(line: str) -> tuple[str, ...]:
    """Return the words of a shell line; one with an open quote is split at spaces."""
    try:
        return tuple(shlex.split(line))
    except ValueError:
        return tuple(line.split())


_REFUSAL = (
    "looks like a secret, and a run's files and command lines can be read by others. Set it in ~/.deepspeed_env or in "
    "the login environment of the hosts"
)
