"""CSV and TSV with a header: cells in quotes may have delimiters and newlines."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.json_lines import lines_of
from btm_scale.data.formats.rows import LONGEST_LINE_BYTES, Fields, NoFieldError, Report, Row
from btm_scale.errors import DataError, first_few
from btm_scale.util.bounded_json import shown

_DELIMITERS = (",", ";", "\t", "|")
_MOST_CELLS = 100_000  # of a row
_COLUMN_NAME = re.compile(r"\w[\w.-]{0,63}( \w[\w.-]{0,63})?")


def read_csv(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of a table whose delimiter is a comma, semicolon, tab or bar. Raises DataError for a missing
    column."""
    yield from _table(file, settings, bad, _DELIMITERS)


def read_tsv(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of a table whose delimiter is a tab. Raises DataError for a missing column."""
    yield from _table(file, settings, bad, "\t")


def looks_like_table(head: str, names: Sequence[str], *, cut: bool = False) -> Literal["csv", "tsv"] | None:
    """Return the format of text that begins as a table whose header has all of `names`: rows of equal length.

    If the text is `cut` after `head`, the last row may be shorter.
    """
    header = head.partition("\n")[0]
    if not all(name in header for name in names):  # as in most texts, which need no closer look
        return None
    for delimiter in _DELIMITERS:
        if delimiter not in header:
            continue
        rows = _first_rows(head, delimiter, cut)
        if len(rows) < 2 or len(rows[0]) < 2 or not set(names) <= set(rows[0]):
            continue
        columns = len(rows[0])
        last_fits = len(rows[-1]) <= columns if cut else len(rows[-1]) == columns
        same_length = last_fits and all(len(row) == columns for row in rows[:-1])
        if same_length and all(map(_COLUMN_NAME.fullmatch, rows[0])):
            return "tsv" if delimiter == "\t" else "csv"
    return None


def _first_rows(head: str, delimiter: str, cut: bool) -> list[list[str]]:
    """Return the rows of text, the last incomplete if it is `cut`; none if it is not a table."""
    for rest in ("", '"') if cut else ("",):  # `head` may end inside quotes, as most tables of long texts do
        try:
            return list(csv.reader(io.StringIO(head + rest, newline="\n"), delimiter=delimiter, strict=True))
        except csv.Error:
            continue
    return []


class _Lines:
    """The decoded lines of one row after another. Unlike a generator it can be read after an error."""

    def __init__(self, stream: BinaryIO, bad: Report) -> None:
        self._lines = lines_of(stream, bad)
        self.number = 0
        self._bytes = 0

    def start_row(self) -> None:
        """Begin to count the bytes of a row."""
        self._bytes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        self._bytes += len(line)
        if self._bytes > LONGEST_LINE_BYTES:
            raise ValueError(f"the row is longer than {LONGEST_LINE_BYTES >> 20} MiB; a closing quote may be missing")
        if len(line) > _MOST_CELLS and sum(line.count(delimiter.encode()) for delimiter in _DELIMITERS) > 1 << 23:
            raise ValueError("the row has more than 8 million delimiters")
        try:
            return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None


def _table(file: SourceFile, settings: DomainConfig, bad: Report, delimiters: Sequence[str]) -> Iterator[Row]:
    fields = Fields(settings)
    csv.field_size_limit(LONGEST_LINE_BYTES)
    with file.open() as stream:
        lines, first = _Lines(stream, bad), ""
        try:
            first = next(lines, "")
            delimiter, header = _header(file, first, lines, fields, delimiters)
        except (ValueError, csv.Error) as error:
            if "\r" in first.rstrip("\r\n"):
                raise DataError(
                    f"{file.path}, line 1: its lines end with a carriage return alone. The rows of a table end with a "
                    "newline: convert the file, for example with tr '\\r' '\\n'."
                ) from None
            raise DataError(f"{file.path}, line 1: {error}. The first row must name the columns: correct it.") from None
        if not header:
            return
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            lines.start_row()
            number = lines.number + 1
            try:
                cells = next(reader)
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"the row has {len(cells)} cells, and the header has {len(header)}")
                found = fields(dict(zip(header, cells, strict=True)))
            except StopIteration:
                return
            except NoFieldError as error:
                bad(number, str(error), error.remedy)
            except (ValueError, csv.Error) as error:
                bad(number, str(error))
            else:
                if found is not None:
                    yield (number, *found)


def _header(
    file: SourceFile, first: str, lines: _Lines, fields: Fields, delimiters: Sequence[str]
) -> tuple[str, list[str]]:
    """Return the delimiter with which the header has every field, and the names of the columns."""
    if not first.strip():
        return ",", []
    headers: dict[str, list[str]] = {}
    for delimiter in delimiters:
        # A name in quotes with a newline continues on the next line, which only the right delimiter may read.
        rows = csv.reader([first], delimiter=delimiter, strict=first.count('"') % 2 == 0)
        headers[delimiter] = next(rows, [])
    for delimiter, header in headers.items():
        if all(name in header for name in fields.names):
            if len(set(header)) < len(header):
                raise ValueError("two columns have the same name")
            return delimiter, header
    header = max(headers.values(), key=len)
    missing = next(name for name in fields.names if name not in header)
    columns = first_few([shown(name) for name in header], "columns", most=20)
    raise DataError(
        f"{file.path} has no column '{missing}', only {columns}. Set the domain's "
        f"{fields.names[missing].partition('.')[0]}, write the names of the columns above the first row if they are "
        "missing, or set `format: text` to read the file as plain text."
    )
