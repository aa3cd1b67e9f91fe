"""A row's text, split key and conditions: fields by name or path, the same for every format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Protocol

from btm_scale.config.data import DomainConfig, FilterConfig, SplitUnit
from btm_scale.data.chat.rows import TOOLS, conversation_of
from btm_scale.data.files import is_utf8
from btm_scale.errors import first_few
from btm_scale.util.bounded_json import shown

LONGEST_LINE_BYTES = 64 << 20  # a line and its text take up to 10 times as much memory

# The number of a line or row from 1, its text, and its split key.
Row = tuple[int, str, str | None]

_ABSENT = object()


class Report(Protocol):
    """Reports a bad line of a file: its number, what is wrong, and the first remedy to try."""

    def __call__(self, number: int, why: str, remedy: str = "", *, damaged: bool = False) -> None:
        """Report one line. `damaged`: nothing after it can be read."""


class NoFieldError(ValueError):
    """A row without a field. `key` is the setting of the domain that names the field."""

    def __init__(self, field: str, row: Mapping[str, Any], key: str) -> None:
        names = first_few([shown(name) for name in row], "fields", most=20)
        super().__init__(f"no field '{field}'; fields are {names or 'none'}")
        self.remedy = f"Set `{key}` of the domain to one of them" if row else ""


class Fields:
    """Extracts a domain's text from rows."""

    def __init__(self, settings: DomainConfig) -> None:
        self._field = settings.field if isinstance(settings.field, str) else None
        self._fields = settings.fields
        self._chat = settings.chat
        self._filter = settings.filter
        self._unit = settings.split_by if isinstance(settings.split_by, SplitUnit) else None

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields that rows may have."""
        return (TOOLS,) if self._chat is not None else ()

    @property
    def names(self) -> dict[str, str]:
        """The fields that rows must have, each with the setting that names it."""
        names = {condition.field: "filter.field" for condition in self._filter}
        if self._unit is not None:
            names[self._unit.field] = "split_by.field"
        return names | dict.fromkeys(self._fields, "field")

    def __call__(self, row: Mapping[str, Any]) -> tuple[str, str | None] | None:
        """Return a row's text and split key, or None if a filter excludes it. Raises ValueError with what is wrong."""
        for condition in self._filter:
            if not _meets(row, condition):
                return None
        if self._chat is not None:
            values = [_value(row, field, "field") for field in self._fields]
            text = conversation_of(self._chat, values, row.get(TOOLS))
        else:
            text = _text_of(row, self._field) if self._field is not None else self._joined(row)
        if len(text) > LONGEST_LINE_BYTES:
            raise ValueError(f"field '{self._field or self._fields[0]}' is longer than {LONGEST_LINE_BYTES >> 20} MiB")
        if not is_utf8(text):
            name = self._field or "' or '".join(self._fields)
            raise ValueError(f"field '{name}' holds half a surrogate pair, which is not valid text")
        return text, self._split_key(row)

    def _joined(self, row: Mapping[str, Any]) -> str:
        # A title or an abstract may be null; a field that is absent is a misspelt name.
        parts = [_text_of(row, field, optional=True) for field in self._fields]
        return "\n\n".join(part for part in parts if part)

    def _split_key(self, row: Mapping[str, Any]) -> str | None:
        if self._unit is None:
            return None
        value = _value(row, self._unit.field, "split_by.field")
        if value is None:
            raise ValueError(f"field '{self._unit.field}', which split_by names, is null")
        key = str(value)
        return key.partition(self._unit.until)[0] if self._unit.until else key


def _value(row: Mapping[str, Any], field: str, key: str) -> Any:
    """Return the value of a field; `a.b` is the key `a.b`, or the key `b` of the object in `a`."""
    if field in row:
        return row[field]
    value: Any = row
    rest = field
    while "." in rest:
        name, _, rest = rest.partition(".")
        value = value.get(name, _ABSENT)
        if not isinstance(value, Mapping):
            break
        if rest in value:
            return value[rest]
    raise NoFieldError(field, row, key)


_KINDS = {type(None): "null", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _text_of(row: Mapping[str, Any], field: str, optional: bool = False) -> str:
    text = row[field] if field in row else _value(row, field, "field")
    if isinstance(text, str):
        return text
    if optional and text is None:
        return ""
    if isinstance(text, bytes):  # some writers of Parquet store text without its type
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"field '{field}' holds bytes that are not UTF-8 (byte {error.start})") from None
    if isinstance(text, list) and text and all(isinstance(part, str) for part in text):
        return "\n".join(text)
    raise ValueError(f"field '{field}' holds {_KINDS.get(type(text), type(text).__name__)}, not text")


def _meets(row: Mapping[str, Any], condition: FilterConfig) -> bool:
    value = _value(row, condition.field, "filter.field")
    if condition.one_of is not None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if text not in condition.one_of:
            return False
    if condition.min is None and condition.max is None:
        return True
    number = _number(value, condition.field)
    return (condition.min is None or number >= condition.min) and (condition.max is None or number <= condition.max)


def _number(value: Any, field: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"field '{field}', which filter compares, is not a number: {shown(value)}")
    return number
