"""JSON lines: one object per line."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.rows import LONGEST_LINE_BYTES, Fields, NoFieldError, Report, Row
from btm_scale.util.bounded_json import parse_json


def lines_of(stream: BinaryIO, bad: Report) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a stream with their numbers; one that is too long for memory is reported."""
    number = 0
    while piece := stream.readline(LONGEST_LINE_BYTES):
        number += 1
        if len(piece) < LONGEST_LINE_BYTES or piece.endswith(b"\n"):
            yield number, piece
            continue
        bad(number, f"the line is longer than {LONGEST_LINE_BYTES >> 20} MiB")
        while piece and not piece.endswith(b"\n"):
            piece = stream.readline(1 << 20)


def json_rows(number: int, content: bytes, fields: Fields, bad: Report) -> Iterator[Row]:
    """Yield the row in the JSON object `content`, if it has a text that no filter excludes."""
    try:
        row = parse_json(content, unique_keys=False, unicode=False)
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, found {type(row).__name__}")
        if (found := fields(row)) is not None:
            yield (number, *found)
    except NoFieldError as error:
        bad(number, str(error), error.remedy)
    except ValueError as error:
        several = "(Extra data" in str(error) and content.lstrip()[:1] == b"{"
        bad(number, str(error), "Set the domain's `format` to json if a line holds several objects" if several else "")


def read_json_lines(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of a file of JSON lines."""
    fields = Fields(settings)
    with file.open() as stream:
        for number, line in lines_of(stream, bad):
            if not line.isspace():
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                yield from json_rows(number, content, fields, bad)
