"""Which settings of a run may change between two calls on its folder; each field is marked where it is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic_core import to_jsonable_python

from btm_scale.config.section import Section

T = TypeVar("T")

# What is done again after a change.
NOTHING_AGAIN = "no model is trained or scored again"
SCORED_AGAIN = "every model is scored again"


def _never(before: Any, after: Any) -> str:
    return ""


@dataclass(frozen=True)
class Changes:
    """Marks a field that may change: it affects how a model is trained, scored or started, not its weights.

    `unless` gets the section before and after the change, and returns why the field may not change; "" if it may.
    `keys`, of a mapping: the only keys that may change, those of nested mappings with dots. `effect`: what is done
    again.
    """

    unless: Callable[[Any, Any], str] = _never
    keys: frozenset[str] | None = None
    effect: str = NOTHING_AGAIN


# As in `every: MayChange[int] = 100`.
MayChange = Annotated[T, Changes()]


@dataclass(frozen=True)
class Difference:
    """A setting that differs between two configs of one run folder."""

    path: tuple[str, ...]  # keys in the YAML
    before: Any
    after: Any
    reason: str = ""  # why it may not change, if that needs a reason
    effect: str = ""  # what is done again; empty if it may not change

    @property
    def is_allowed(self) -> bool:
        """Whether the setting may change."""
        return bool(self.effect)

    def __str__(self) -> str:
        key = ".".join(self.path)
        return f"{key}: {self.before} there, {self.after} here" + (f" ({self.reason})" if self.reason else "")


def differences(before: Section, after: Section, path: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Yield the settings that differ between two sections of one type, with whether they may."""
    for name, field in type(before).model_fields.items():
        one, other = getattr(before, name), getattr(after, name)
        if one == other:
            continue
        here = (*path, name)
        marks = [mark for mark in field.metadata if isinstance(mark, Changes)]
        reasons = [reason for mark in marks if (reason := mark.unless(before, after))]
        found = _differences(one, other, here, " ".join(reasons))
        if not marks or reasons:
            yield from found
            continue
        [mark] = marks
        for difference in found:
            key = difference.path[len(here) :]
            may_change = mark.keys is None or any(".".join(key[:n]) in mark.keys for n in range(1, len(key) + 1))
            yield replace(difference, reason="", effect=mark.effect if may_change else "")


def _differences(one: Any, other: Any, path: tuple[str, ...], reason: str) -> Iterator[Difference]:
    if isinstance(one, Section) and type(one) is type(other):
        yield from differences(one, other, path)
    elif isinstance(one, dict | None) and isinstance(other, dict | None):
        one, other = one or {}, other or {}
        for key in dict.fromkeys([*one, *other]):
            if one.get(key) != other.get(key):
                yield from _differences(one.get(key), other.get(key), (*path, str(key)), reason)
    else:
        yield Difference(path, to_jsonable_python(one), to_jsonable_python(other), reason)
