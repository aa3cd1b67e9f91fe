"""What looks like a secret: one rule for configs, messages and logs.

A run's folder, its logs and command lines can be read by others, so a secret in a config is refused, and one in a
message is masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAME = re.compile(
    r"(^|_)(TOKEN(?!_FILES$)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTHORIZATION|AUTH|COOKIE"
    r"|(API|ACCESS|PRIVATE|SECRET|SIGNING|ACCOUNT|SSH|MASTER)_?KEY|APIKEY)(_|$)"
)
_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # of camelCase
_ASSIGNMENT = re.compile(r"(?<![\w-])-{0,2}([A-Za-z_][\w-]*)(?:=|:\s+)(?=\S)")
_ASSIGNED = re.compile(r"""\b([A-Za-z_][\w-]*)=("[^"]*"|'[^']*'|[^\s'"]+)""")
_OPTION = re.compile(r"--?([A-Za-z_][\w-]*)")
_VALUE = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"  # OpenAI, Anthropic and others
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bxox[abeprs]-[\w-]{10,}|\bAIza[\w-]{35}|\bwandb_v\d+_\w{20,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{5,}"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?i:\bauthorization\s*:\s*\S+(?:\s+\S+)?|\b(?:bearer|basic)\s+[\w.~+/=-]{16,})"
    r"|(?<=://)[^/\s:@]*:[^/\s]+(?=@)"  # user:password@ in a URL
    r"|(?<=https://)[^/\s:@]+(?=@)"  # a token in place of a user
)
_PARAMETER = re.compile(r"""([?&]([\w.-]+)=)[^&#\s'"]+""")  # of a URL
_SIGNATURES = ("sig", "signature", "awsaccesskeyid", "googleaccessid")  # of presigned URLs
_MASK = "***"


def is_secret_name(name: str) -> bool:
    """Return whether a variable, key or option is named like one that holds a secret: HF_TOKEN, apiKey, --password."""
    words = _WORD_STARTS.sub("_", name).replace("-", "_").replace(".", "_").upper()
    return _NAME.search(words) is not None


def has_secret(text: str) -> bool:
    """Return whether a text has the form of a known kind of token or key, or holds a URL with a password."""
    if "://" in text and any(_is_secret_parameter(match[2]) for match in _PARAMETER.finditer(text)):
        return True
    return _VALUE.search(text) is not None


def masked(text: str) -> str:
    """Return a text with every secret that has a known form, or is assigned to the name of one, replaced by `***`."""
    if "://" in text:
        text = _PARAMETER.sub(lambda match: f"{match[1]}{_MASK}" if _is_secret_parameter(match[2]) else match[0], text)
    return _ASSIGNED.sub(_without_value, _VALUE.sub(_MASK, text))


def _is_secret_parameter(name: str) -> bool:
    return is_secret_name(name) or name.lower() in _SIGNATURES or name.lower().endswith("-signature")


def _without_value(match: re.Match[str]) -> str:
    return f"{match[1]}={_MASK}" if is_secret_name(match[1]) else match[0]


def assigned_secrets(text: str) -> Iterator[str]:
    """Yield the names in `NAME=value`, `--name=value` and `Name: value` that look like secrets."""
    return (name for name in _ASSIGNMENT.findall(text) if is_secret_name(name))


def secrets_of_command(words: tuple[str, ...]) -> Iterator[str]:
    """Yield what looks like a secret in the words of a command: assignments, and options with a value after them."""
    for position, word in enumerate(words):
        yield from assigned_secrets(word)
        option = _OPTION.fullmatch(word)
        if option is not None and is_secret_name(option[1]) and position + 1 < len(words):
            yield word


def secrets_in(values: Any, path: tuple[str, ...] = (), *, free: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted paths of values that look like secrets, by their keys or by their form, in nested values.

    In the top-level sections `free`, whose keys are those of other programs, numbers and assignments count too.
    """
    if isinstance(values, Mapping):
        for key, value in values.items():
            inner = (*path, str(key) if not has_secret(str(key)) else _MASK)
            if has_secret(str(key)) or (is_secret_name(str(key)) and _may_be_secret(value, inner[0] in free)):
                yield ".".join(inner)
            else:
                yield from secrets_in(value, inner, free=free)
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from secrets_in(value, (*path, str(number)), free=free)
    elif isinstance(values, str) and (has_secret(values) or (path[:1] and path[0] in free and _assigns(values))):
        yield ".".join(path)


def _may_be_secret(value: Any, is_free: bool) -> bool:
    if isinstance(value, list | tuple):
        return any(_may_be_secret(item, is_free) for item in value)
    return (isinstance(value, str) and value != "") or (
        is_free and isinstance(value, int | float) and not isinstance(value, bool)
    )


def _assigns(text: str) -> bool:
    return next(assigned_secrets(text), None) is not None
