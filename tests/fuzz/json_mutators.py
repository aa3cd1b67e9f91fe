"""Mutations of JSON that keep it valid, or nearly so: other types, sizes and keys anywhere in it."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any

_DEEP = "<deep>"
_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, math.nan, math.inf, 1 << 31, 1 << 63, -(1 << 63), 10**40),
    *("", "0", "1e3", "x" * 3000, "\x1b]0;owned\x07", "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "F32", "BF16"),
    *([], {}, [[]], [0], [0, 0], [1, 2, 3], {"a": 1}, _DEEP, list(range(200)), [1 << 40, 1 << 40]),
]
_KEYS = ["", "a", "__metadata__", "schema", "x" * 500, "\x1b[2J", "\ud83d", "../x", "0"]


def mutate_json(draw: Random, content: bytes) -> bytes:
    """Return a JSON text with one value replaced, moved, removed, renamed, or given twice."""
    value = json.loads(content)
    parents = list(_parents(value))
    kind = draw.randrange(8)
    if not parents or (kind == 7 and draw.random() < 0.2):
        value = draw.choice(_VALUES)
    else:
        parent = draw.choice(parents)
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        if kind in (0, 1, 2):
            parent[key] = draw.choice(_VALUES)
        elif kind == 3:
            del parent[key]
        elif kind == 4:
            other = draw.choice(parents)
            parent[key] = copy.deepcopy(draw.choice(list(other.values()) if isinstance(other, dict) else other))
        elif kind == 5:
            parent[key] = _changed(draw, parent[key])
        elif isinstance(parent, dict):
            parent[draw.choice([*_KEYS, *parent])] = parent.pop(key) if kind == 6 else draw.choice(_VALUES)
        else:
            parent += [draw.choice(_VALUES)] * draw.choice((1, 2, 300))
    text = json.dumps(value)
    depth = draw.choice((40, 70, 300, 900, 2000, 100_000))
    opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
    deep = opening * depth + "0" + closing * draw.choice((depth, 0))
    text = text.replace(f'"{_DEEP}"', deep)
    if draw.random() < 0.05 and text.startswith("{") and "," in text:
        text = "{" + text[1:-1] + "," + text[1:]  # every key twice
    return text.encode("utf-8", "surrogatepass")


def _changed(draw: Random, value: Any) -> Any:
    """Return a value close to another, or of another type."""
    if isinstance(value, bool):
        return draw.choice((int(value), str(value), None))
    if isinstance(value, (int, float)):
        return draw.choice((value + 1, value - 1, -value, str(value), [value], float(value), value * 1024))
    if isinstance(value, str):
        return draw.choice((value + "\0", value[:-1], value.upper(), [value], {value: value}, value * 50, 3))
    if isinstance(value, list):
        return draw.choice((value[:-1], value * 2, value[::-1], dict.fromkeys(map(str, value), 1), str(value)))
    return draw.choice((list(value), str(value), None))


def _parents(value: Any) -> Any:
    """Yield every container that has items."""
    if isinstance(value, (dict, list)):
        if value:
            yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parents(item)
