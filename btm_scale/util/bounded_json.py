"""The only parser of untrusted JSON: bounded in bytes, values and depth, and with unique keys.

JSON of a few megabytes can expand to gigabytes of objects, or be nested more deeply than the interpreter's stack.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000  # as for the header of safetensors in the reference implementation
# Every value but the first follows one of `,`, `[` and `{`; 3 million of them take at most some 500 MB.
_MAX_VALUES = 3_000_000
_MAX_DEPTH = 64
_PIECE_BYTES = 1 << 22
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_bounded(path: Path, most: int = MAX_BYTES) -> bytes:
    """Return the content of a file of at most `most` bytes.

    Raises `ValueError` for a larger one, and for a pipe or device, which may have no end. Raises `OSError`.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most / 1e6:g} MB")
    return content


def parse_json(content: bytes, *, unique_keys: bool = True, unicode: bool = True) -> Any:
    """Return the value of UTF-8 JSON.

    With `unicode`, text must be valid Unicode; otherwise it may have lone surrogates, as the names of files do. Raises
    `ValueError` with a reason that completes "the file is ...".
    """
    if _has_more_marks(content, _MAX_VALUES):
        raise ValueError(f"larger than {_MAX_VALUES:,} JSON values")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except _DuplicateKeyError as error:
        raise ValueError(f"ambiguous: the key {error} appears twice") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None
    _require_shallow(value)
    if unicode and _SURROGATE.search(content) and not _is_unicode(value):
        raise ValueError("not valid Unicode: a string has half a surrogate pair")
    return value


def shown(value: object, most: int = 60) -> str:
    """Return the repr of a foreign value for a message, cut at `most` characters."""
    if isinstance(value, str):
        value = value[: most + 1]
    elif isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > most:
        return f"a {type(value).__name__} of {len(value)} items"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def _has_more_marks(content: bytes, most: int) -> bool:
    """Whether `content` has more than `most` of `,`, `[` and `{` outside strings."""
    if len(content) <= most or content.count(b",") + content.count(b"[") + content.count(b"{") <= most:
        return False
    return _marks_outside_strings(content) > most


def _marks_outside_strings(content: bytes) -> int:
    import numpy as np  # only for large content, and so not for --help

    # An escape outside a string is an error, at which the parser stops.
    unescaped = np.frombuffer(content.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    marks, inside = 0, np.uint8(0)
    for start in range(0, len(unescaped), _PIECE_BYTES):
        piece = unescaped[start : start + _PIECE_BYTES]
        quotes = np.cumsum(piece == ord('"'), dtype=np.uint8) + inside  # modulo 256, which keeps it odd or even
        marks += int(np.count_nonzero(np.isin(piece, list(b",[{")) & (quotes % 2 == 0)))
        inside = quotes[-1] % 2
    return marks


class _DuplicateKeyError(ValueError):
    """A key that appears twice in an object."""


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(shown(key))
            seen.add(key)
    return result


def _require_shallow(value: Any) -> None:
    # In comprehensions, because it is a large part of the time that long answers of engines take.
    level = [value] if type(value) in (dict, list) else []
    for _ in range(_MAX_DEPTH):
        items = chain.from_iterable(one.values() if type(one) is dict else one for one in level)
        level = [item for item in items if type(item) is dict or type(item) is list]
        if not level:
            return
    raise ValueError("nested too deeply")


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
