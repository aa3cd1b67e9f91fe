"""provenance.json: what a finished output was made from, so that repeating the command changes nothing.

A batch job that is retried after it finished then succeeds. The record is written before the output gets its name.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field

from btm_scale.errors import UserError
from btm_scale.util.records import Part, Record, is_empty

NAME = "provenance.json"
_CARD = "README.md"  # which its owner may rewrite


class Input(Part):
    """An input of a command. Only its last name is recorded, because the output may be published."""

    name: str
    weight: float | None = None
    files: str  # a digest that changes with the name, size or modification time of any of its files
    sizes: str = Field(default="", exclude_if=is_empty)  # of names and sizes; earlier versions did not record it

    @classmethod
    def of(cls, path: Path, *, weight: float | None = None, besides: Path | None = None) -> Self:
        """Describe a file or a directory as it is now, without what is in the directory `besides`."""
        states = _states(path, besides and besides.resolve())
        sizes = [(name, size) for name, (size, _) in states]
        return cls(name=path.resolve().name, weight=weight, files=_digest(states), sizes=_digest(sizes))

    def may_equal(self, other: Self) -> bool:
        """Whether only modification times are known to differ: the files may have been copied or touched."""
        return (self.name, self.weight) == (other.name, other.weight) and self.sizes in ("", other.sizes)

    def __str__(self) -> str:
        return self.name if self.weight is None else f"{self.name}={self.weight:g}"


class Provenance(Record):
    """provenance.json: the command behind an output, its inputs and settings, its answer, and the output's files."""

    REMEDY: ClassVar[str] = "Choose another output, or remove {folder}."

    command: str
    inputs: tuple[Input, ...]
    settings: dict[str, Any]
    answer: dict[str, Any]
    files: dict[str, int] = {}  # size in bytes by path

    def write_into(self, directory: Path) -> None:
        """Write the record, synced, into a complete directory that is about to be published."""
        self.model_copy(update={"files": _sizes(directory)}).save(directory / NAME)


def is_recorded(output: Path) -> bool:
    """Return whether a directory, and not a link to one, has a record of what it was made from."""
    return not output.is_symlink() and (output / NAME).is_file()


def made_before(
    output: Path, requested: Provenance, error: type[UserError], *, is_same: Callable[[], bool] = lambda: False
) -> Provenance | None:
    """Return the record of an output that was made by the same command from the same inputs; None if it has no record.

    `is_same` tells whether the command would make the same output again. It is asked if nothing but modification times
    of inputs is known to differ, which are then recorded. Raises `error` with the differences if the output was made
    from something else, was changed since, or is another user's.
    """
    if not is_recorded(output):
        return None
    if {output.stat().st_uid, (output / NAME).lstat().st_uid} != {os.geteuid()}:
        raise error(
            f"{output} already exists and belongs to another user, whose record of it is not trusted. Choose another "
            "output, or remove it first."
        )
    recorded = Provenance.load(output / NAME)
    touched = recorded.model_copy(update={"inputs": requested.inputs})
    others = [*_differences(touched, requested), *_changes(output, recorded)]
    if _may_be_touched(recorded, requested) and not others and is_same():
        touched.save(output / NAME)
        return touched
    if differences := [*_differences(recorded, requested), *_changes(output, recorded)]:
        raise error(
            f"{output} already exists, and {'; '.join(differences)}. {requested.command} does not overwrite: choose "
            "another output, or remove it first."
        )
    return recorded


def same_files(directory: Path, other: Path) -> bool:
    """Return whether the files of an output, but for its card and record, are those of another with the same bytes."""
    pairs = [(directory / name, other / name) for name in _sizes(directory)]
    return all(theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False) for ours, theirs in pairs)


def _may_be_touched(recorded: Provenance, requested: Provenance) -> bool:
    pairs = [*zip(recorded.inputs, requested.inputs, strict=False)]
    has_changed = len(recorded.inputs) == len(requested.inputs) and any(old.files != new.files for old, new in pairs)
    return has_changed and all(old.may_equal(new) for old, new in pairs)


def _differences(recorded: Provenance, requested: Provenance) -> Iterable[str]:
    if recorded.command != requested.command:
        yield f"it was made by {recorded.command}"
        return
    before, now = [", ".join(map(str, one.inputs)) for one in (recorded, requested)]
    if [one.weight for one in recorded.inputs] != [one.weight for one in requested.inputs]:
        yield f"it was made from {before} and not from {now}"
    else:
        for old, new in zip(recorded.inputs, requested.inputs, strict=True):
            if old.files != new.files:
                was = "has changed since" if old.name == new.name else f"is not {old.name}"
                yield f"{new.name} {was}"
    for name in dict.fromkeys([*recorded.settings, *requested.settings]):
        values = recorded.settings.get(name), requested.settings.get(name)
        if values[0] != values[1]:
            yield f"{name} was {_shown(values[0])} and is now {_shown(values[1])}"


def _changes(output: Path, recorded: Provenance) -> Iterable[str]:
    sizes = _sizes(output)
    changed = [name for name, size in recorded.files.items() if sizes.get(name) != size]
    if changed:
        yield f"its {changed[0]} was changed or removed after {recorded.command} had finished"


def _shown(value: object) -> str:
    return "not given" if value is None or value == {} else repr(value)


def _sizes(directory: Path) -> dict[str, int]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in (NAME, _CARD))
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def _states(path: Path, besides: Path | None) -> list[tuple[str, tuple[int, int]]]:
    """Return the size and the modification time of each file of an input, by its path."""
    files: dict[str, tuple[int, int]] = {}
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            folders[:] = [
                name for name in folders if not name.startswith(".") and Path(folder, name).resolve() != besides
            ]
            for name in names:
                # Hidden files are temporary, and a card or a record says nothing about the weights.
                if not name.startswith(".") and name not in (NAME, _CARD) and Path(folder, name).is_file():
                    files[str(Path(folder, name).relative_to(path))] = _state(Path(folder, name))
    else:
        files[""] = _state(path)
    return sorted(files.items())


def _digest(listed: object) -> str:
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
