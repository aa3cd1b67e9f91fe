"""Which settings of a run may change between two calls on its folder; each field is marked where it is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic_core import to_jsonable_python

from btm_scale.config.section import Section

T = TypeVar("T")


def _never(before: Any, after: Any) -> str:
    return ""


@dataclass(frozen=True)
class Changes:
    """Marks a field that may change: it affects how a model is trained, scored or started, not its weights.

    `unless` gets the section before and after the change, and returns why the field may not change; "" if it may.
    """

    unless: Callable[[Any, Any], str] = _never


# As in `every: MayChange[int] = 100`.
MayChange = Annotated[T, Changes()]


@dataclass(frozen=True)
class Difference:
    """A setting that differs between two configs of one run folder."""

    path: tuple[str, ...]  # keys in the YAML
    before: Any
    after: Any
    reason: str = ""  # why it may not change, if that needs a reason

    def __str__(self) -> str:
        key = ".".join(self.path)
        return f"{key}: {self.before} there, {self.after} here" + (f" ({self.reason})" if self.reason else "")


def fixed_differences(before: Section, after: Section, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Yield the settings that differ between two sections of one type and may not change."""
    for name, field in type(before).model_fields.items():
        one, other = getattr(before, name), getattr(after, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Changes)]
        reasons = [reason for mark in marks if (reason := mark.unless(before, after))]
        if one != other and (reasons or not marks):
            yield from _differences(one, other, (*path, name), " ".join(reasons))


def _differences(one: Any, other: Any, path: tuple[str, ...], reason: str) -> Iterator[Difference]:
    if isinstance(one, Section) and type(one) is type(other):
        yield from fixed_differences(one, other, path)
    elif isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                yield from _differences(one.get(key), other.get(key), (*path, str(key)), reason)
    else:
        yield Difference(path, to_jsonable_python(one), to_jsonable_python(other), reason)
