"""Hostfiles: lines of `HOST slots=N`, as DeepSpeed and Open MPI read them; HOST may be a list such as n[01-08,11]."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from btm_scale.errors import LaunchError
from btm_scale.util.bounded_json import read_bounded

_SLOTS = re.compile(r"slots\s*=\s*([0-9]{1,5})")
_MOST_HOSTS = 100_000
_LIST = re.compile(r"\[([0-9,-]+)\]")
_NAME = re.compile(r"[^\s\[\],:@=\"'`$;&|<>(){}\\]+")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_hostfile(path: Path) -> dict[str, int]:
    """Return the slots by host, in the order of the file: lines of `HOST slots=N`, with # for comments.

    Raises LaunchError if the file is missing or empty, a line has another form or an option, a name contains one of
    DeepSpeed's separators, or a host is listed twice.
    """
    try:
        lines = _lines(path, read_bounded(path))
    except ValueError as error:
        raise LaunchError(f"{path} is not a hostfile: {error}. Write lines of `HOST slots=N`.") from None
    except OSError as error:
        raise LaunchError(
            f"No hostfile at {path} ({error.strerror}). Set launch.deepspeed.hostfile, or use --launcher local."
        ) from None
    slots: dict[str, int] = {}
    known: set[str] = set()  # in lower case, because n1 and N1 are one host
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        where = f"{path}, line {number}"
        names, own = _entry(text, where)
        for name in names:
            if name.lower() in known:
                raise LaunchError(f"{where}: host '{name}' is listed twice. Give all its slots in one line.")
            known.add(name.lower())
            slots[name] = own
        if len(slots) > _MOST_HOSTS:
            raise LaunchError(f"{where}: more than {_MOST_HOSTS:,} hosts. Check the list in brackets.")
    if not slots:
        raise LaunchError(f"{path} lists no host. Write a line `HOST slots=N` for each.")
    return slots


def _lines(path: Path, content: bytes) -> list[str]:
    """Return the lines of a file in UTF-8, with or without its mark, or in UTF-16 with it.

    Comments may be in any encoding. Raises ValueError for bytes outside of comments that are not text.
    """
    if content.startswith(_UTF_16):
        text = content.decode("utf-16")
    else:
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = [line.partition("#")[0] for line in re.split(r"\r\n|\r|\n", text)]
    for number, line in enumerate(lines, start=1):
        if re.search("[\0\ud800-\udfff]", line):
            raise ValueError(f"line {number} is not UTF-8")
    return lines


def _entry(text: str, where: str) -> tuple[list[str], int]:
    """Return the hosts of a line, and the slots of each."""
    name, _, rest = re.sub(r"\s*=\s*", "=", text).partition(" ")
    name, options = (name, rest.split()) if "\t" not in name else (name.split()[0], [*name.split()[1:], *rest.split()])
    counts = [match[1] for option in options if (match := _SLOTS.fullmatch(option))]
    other = [option for option in options if not _SLOTS.fullmatch(option)]
    named = next((option for option in other if "=" in option and not option.startswith("slots=")), None)
    if named is not None:
        raise LaunchError(
            f"{where}: '{named.partition('=')[0]:.60}' is not an option here. A line is `HOST slots=N`: remove it, and "
            "set ports and users of a host in ssh's config."
        )
    if other or len(counts) != 1 or int(counts[0]) == 0 or "=" in name:
        raise LaunchError(f"{where}: '{text:.200}' is not a host. Write it as `HOST slots=N`.")
    if not {":", "@"}.isdisjoint(name):
        raise LaunchError(
            f"{where}: '{name:.200}' cannot name a host. ':' and '@' are separators of DeepSpeed's "
            "launcher: give the host a name in /etc/hosts, or with its user in ssh's config."
        )
    hosts = [host for part in re.split(r",(?![^\[]*\])", name) for host in _expanded(part, where)]
    bad = next((host for host in hosts if not _NAME.fullmatch(host)), None)
    if bad is not None:
        raise LaunchError(f"{where}: '{bad:.200}' cannot name a host. Write lists as n[01-08,11].")
    return hosts, int(counts[0])


def _expanded(name: str, where: str) -> list[str]:
    """Return the hosts of a name with lists of numbers in brackets, as SLURM and pdsh write them."""
    parts = _LIST.split(name)
    choices = [[part] if place % 2 == 0 else _numbers(part, where) for place, part in enumerate(parts)]
    hosts = itertools.islice(itertools.product(*choices), _MOST_HOSTS + 1)
    return ["".join(words) for words in hosts]


def _numbers(text: str, where: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if not 0 <= int(last) - int(first) < _MOST_HOSTS:
            raise LaunchError(f"{where}: '[{text:.100}]' is not a list of numbers. Write it as [01-08,11].")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers
