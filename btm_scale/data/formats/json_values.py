"""JSON that is not one object per line: an array of objects, or objects over several lines, in bounded memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.json_lines import json_rows
from btm_scale.data.formats.rows import LONGEST_LINE_BYTES, Fields, Report, Row

_CHUNK = 1 << 18
_DEEPEST = 1000
_SPACE = b" \t\r\n"
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING_END = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SCALAR_END = re.compile(rb"[,\]\s]")


def read_json_values(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of a JSON array, or of objects one after another; a row's number is its place in the file."""
    fields = Fields(settings)
    number = 0
    with file.open() as stream:
        try:
            for number, content in enumerate(_values(_Window(stream)), start=1):
                yield from json_rows(number, content, fields, bad)
        except _StructureError as error:
            bad(number + 1, str(error), damaged=True)


class _StructureError(ValueError):
    """What separates the values is not JSON, so that the next value cannot be found."""


class _Window:
    """The unread part of a stream that is in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.content = stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
        self.position = 0

    def more(self) -> bool:
        """Read on; returns False at the end of the stream."""
        rest = self.content[self.position :]
        piece = self._stream.read(max(_CHUNK, len(rest)))
        self.content = rest + piece
        self.position = 0
        return bool(piece)

    def next_byte(self, skipping: bytes) -> bytes:
        """Return the next byte that is not in `skipping`, without reading it; b"" at the end."""
        while True:
            rest = self.content[self.position : self.position + 4096].lstrip(skipping)
            if rest:
                self.position += min(4096, len(self.content) - self.position) - len(rest)
                return rest[:1]
            self.position = min(len(self.content), self.position + 4096)
            if self.position == len(self.content) and not self.more():
                return b""


def _values(window: _Window) -> Iterator[bytes]:
    if window.next_byte(_SPACE) != b"[":
        while byte := window.next_byte(_SPACE):
            if byte != b"{":
                raise _StructureError("expected a JSON object")
            yield _value(window, byte)
        return
    window.position += 1
    separator = window.next_byte(_SPACE)
    while separator != b"]":
        yield _value(window, window.next_byte(_SPACE))
        separator = window.next_byte(_SPACE)
        if not separator:
            raise EOFError("the end of the JSON array is missing")
        if separator not in (b",", b"]"):
            raise _StructureError("expected `,` or `]` after a value of the JSON array")
        if separator == b",":
            window.position += 1
    window.position += 1
    if window.next_byte(_SPACE):
        raise _StructureError("the file continues after the end of the JSON array")


def _value(window: _Window, first: bytes) -> bytes:
    """Return the value at the window's position and move behind it; it is valid JSON only if it is parsed."""
    if first in (b"{", b"["):
        return _take(window, _bracketed)
    if first in (b"", b",", b"]", b"}"):
        raise _StructureError("expected a value of the JSON array")
    if first == b'"':
        return _take(window, _string)
    return _take(window, _scalar)


class _Scanner:
    """The state of the search for a value's end: no byte is scanned twice when more of the file is read."""

    def __init__(self) -> None:
        self.offset = 0  # from the start of the value
        self.depth = 0
        self.in_string = False


def _take(window: _Window, scan: Callable[[_Window, _Scanner], int]) -> bytes:
    state = _Scanner()
    while True:
        end = scan(window, state)
        if end >= 0:
            value = window.content[window.position : end]
            window.position = end
            return value
        if len(window.content) - window.position > LONGEST_LINE_BYTES:
            raise _StructureError(f"a value is longer than {LONGEST_LINE_BYTES >> 20} MiB")
        if not window.more():
            raise EOFError("the end of a JSON value is missing")


def _bracketed(window: _Window, state: _Scanner) -> int:
    content, at = window.content, window.position + state.offset
    while True:
        if state.in_string:
            at = _end_of_string(content, at)
            if at < 0:
                state.offset = -at - 1 - window.position
                return -1
            state.in_string = False
        match = _STRUCTURE.search(content, at)
        if match is None:
            state.offset = len(content) - window.position
            return -1
        at = match.end()
        mark = match[0]
        if mark == b'"':
            state.in_string = True
        elif mark in b"{[":
            state.depth += 1
            if state.depth > _DEEPEST:
                raise _StructureError("nested too deeply")
        else:
            state.depth -= 1
            if state.depth == 0:
                return at


def _end_of_string(content: bytes, at: int) -> int:
    """Return the position after the closing quote, or -1 - (where to look again) if it is not in memory."""
    match = _STRING_END.match(content, at)
    assert match is not None
    end = match.end()
    if end < len(content) and content[end : end + 1] == b'"':
        return end + 1
    return -1 - end


def _string(window: _Window, state: _Scanner) -> int:
    end = _end_of_string(window.content, window.position + max(1, state.offset))
    if end < 0:
        state.offset = -end - 1 - window.position
        return -1
    return end


def _scalar(window: _Window, state: _Scanner) -> int:
    match = _SCALAR_END.search(window.content, window.position + state.offset)
    state.offset = len(window.content) - window.position
    return match.start() if match else -1
