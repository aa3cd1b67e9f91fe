"""Read documents from plain text, JSON lines and Parquet in constant memory."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol

import zstandard

from btm_scale.config.data import DomainConfig, SplitUnit
from btm_scale.data.files import SourceFile, is_utf8
from btm_scale.data.sources import DomainSource
from btm_scale.errors import DataError, first_few
from btm_scale.util.bounded_json import parse_json, shown

PLAIN_DOCUMENT_BYTES = 4 << 20
LONGEST_LINE_BYTES = 64 << 20  # a line and its text take up to 10 times as much memory
_PARQUET_ROWS = 16  # few, because a page of a few bytes can repeat a text of megabytes in every row
_BROKEN_STREAM = (EOFError, OSError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True)
class Document:
    """A text with its origin (file and line). Documents with the same `split_key` stay in one split."""

    text: str
    split_key: str | None
    origin: str


class BadLines:
    """The policy for lines without a valid text: raise an error at the first, or skip and count them."""

    def __init__(self, policy: Literal["error", "skip"] = "error") -> None:
        self.policy = policy
        self.skipped = 0

    def __call__(self, file: SourceFile, line: int, why: str, remedy: str = "") -> None:
        """Handle a bad line, numbered from 1 (in a Parquet file, the row). `remedy` is the first one to try."""
        if self.policy == "error":
            fix = f"{remedy}, fix the line" if remedy else "Fix the line"
            raise DataError(
                f"{file.path}, line {line}: {why}. {fix}, or set data.on_bad_line to skip, which drops and counts "
                "such lines."
            )
        self.skipped += 1


class Report(Protocol):
    """Reports a bad line of a file: its number, what is wrong, and the first remedy to try."""

    def __call__(self, number: int, why: str, remedy: str = "") -> None:
        """Report one line."""


class _NoFieldError(ValueError):
    """A row without a field. `key` is the setting of the domain that names the field."""

    def __init__(self, field: str, row: dict[str, Any], key: str) -> None:
        names = first_few([shown(name) for name in row], "fields", most=20)
        super().__init__(f"no field '{field}'; fields are {names or 'none'}")
        self.remedy = f"Set `{key}` of the domain to one of them" if row else ""


def empty_domain(source: DomainSource, skipped: int) -> DataError:
    """Return the error for a domain without documents."""
    lines = f" ({skipped} bad lines were skipped)" if skipped else ""
    return DataError(
        f"Domain '{source.name}' is empty: its {len(source.files)} files hold no document{lines}. Add text, or "
        "remove the domain."
    )


def read_documents(source: DomainSource, on_bad_line: BadLines) -> Iterator[Document]:
    """Yield every document of a domain, in the order of the file names.

    Raises DataError, which names the domain, for files it cannot read.
    """
    for file in source.files:
        yield from read_file_of(source, file, on_bad_line)


def read_file_of(source: DomainSource, file: SourceFile, on_bad_line: BadLines) -> Iterator[Document]:
    """Yield the documents of one of a domain's files. Raises as `read_documents` does."""
    try:
        yield from read_file(file, source.settings, on_bad_line)
    except DataError as error:
        raise DataError(f"Domain '{source.name}': {error}") from None


def read_file(file: SourceFile, settings: DomainConfig, on_bad_line: BadLines) -> Iterator[Document]:
    """Yield the documents of one file that contain more than whitespace."""
    file.stat()  # a missing file is an error, not a bad line
    line = 0

    def bad(number: int, why: str, remedy: str = "") -> None:
        on_bad_line(file, number, why, remedy)

    if file.format == ".parquet":
        documents = _parquet_rows(file, settings, bad)
    elif file.format in (".jsonl", ".ndjson"):
        documents = _json_rows(file, settings, bad)
    else:
        documents = _plain_text(file, bad)
    by_file = settings.split_by == "file"
    try:
        for line, text, split_key in documents:
            if text and not text.isspace():
                yield Document(text, file.name if by_file else split_key, f"{file.name}:{line}")
    except _BROKEN_STREAM as error:
        # Nothing after the damage is readable.
        bad(line + 1, f"the file is damaged from here on ({type(error).__name__}: {error})")


Row = tuple[int, str, str | None]


def _lines(stream: BinaryIO, bad: Report) -> Iterator[tuple[int, bytes]]:
    number = 0
    while piece := stream.readline(LONGEST_LINE_BYTES):
        number += 1
        if len(piece) < LONGEST_LINE_BYTES or piece.endswith(b"\n"):
            yield number, piece
            continue
        bad(number, f"the line is longer than {LONGEST_LINE_BYTES >> 20} MiB")
        while piece and not piece.endswith(b"\n"):
            piece = stream.readline(1 << 20)


def _json_rows(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    with file.open() as stream:
        for number, line in _lines(stream, bad):
            if line.isspace():
                continue
            try:
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                row = parse_json(content, unique_keys=False, unicode=False)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                yield (number, _text(row, settings.field), _split_key(row, settings.split_by))
            except _NoFieldError as error:
                bad(number, str(error), error.remedy)
            except ValueError as error:
                bad(number, str(error))


def _text(row: dict[str, Any], field: str) -> str:
    if field not in row:
        raise _NoFieldError(field, row, "field")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"field '{field}' holds {type(text).__name__}, not text")
    if len(text) > LONGEST_LINE_BYTES:
        raise ValueError(f"field '{field}' is longer than {LONGEST_LINE_BYTES >> 20} MiB")
    if not is_utf8(text):
        raise ValueError(f"field '{field}' holds half a surrogate pair, which is not valid text")
    return text


def _split_key(row: dict[str, Any], split_by: str | SplitUnit) -> str | None:
    if not isinstance(split_by, SplitUnit):
        return None
    if split_by.field not in row:
        raise _NoFieldError(split_by.field, row, "split_by.field")
    value = row[split_by.field]
    if value is None:
        raise ValueError(f"field '{split_by.field}', which split_by names, is null")
    key = str(value)
    return key.partition(split_by.until)[0] if split_by.until else key


def _parquet_rows(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    # Imported here: other formats are read on machines without pyarrow.
    import pyarrow as pa

    try:
        yield from _table_rows(file, settings, bad)
    except pa.ArrowException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def _table_rows(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    import pyarrow.parquet as pq

    columns = [settings.field]
    if isinstance(settings.split_by, SplitUnit):
        columns.append(settings.split_by.field)
    with file.open_seekable() as stream, pq.ParquetFile(stream) as table:
        missing = [name for name in columns if name not in table.schema_arrow.names]
        if missing:
            available = ", ".join(table.schema_arrow.names)
            raise DataError(
                f"{file.path} has no column '{missing[0]}', only {available}. Set the domain's field or split_by."
            )
        number = 0
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=list(dict.fromkeys(columns))):
            for row in range(batch.num_rows):
                number += 1
                try:
                    values = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
                    yield number, _text(values, settings.field), _split_key(values, settings.split_by)
                except UnicodeDecodeError as error:
                    bad(number, f"not UTF-8 at byte {error.start} of the text")
                except ValueError as error:
                    bad(number, str(error))


def _plain_text(file: SourceFile, bad: Report) -> Iterator[Row]:
    """Yield a file as one document; a long one is cut at blank lines, or at line ends if no blank line is near."""
    parts: list[str] = []
    size, first = 0, 1
    with file.open() as stream:
        for number, line in _line_pieces(stream):
            if not parts:
                first = number
            if first == number == 1 and b"\0" in line:
                bad(1, "a NUL byte: the file is binary, not text")
                return
            try:
                parts.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                bad(number, f"not UTF-8 at byte {error.start} of the line")
                continue
            size += len(line)
            if size >= 2 * PLAIN_DOCUMENT_BYTES or (size >= PLAIN_DOCUMENT_BYTES and line.isspace()):
                yield first, "".join(parts), None
                parts, size = [], 0
    if parts:
        yield first, "".join(parts), None


def _line_pieces(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; a line too long for memory comes in pieces, cut between characters."""
    number, rest = 1, b""
    while piece := stream.readline(PLAIN_DOCUMENT_BYTES):
        piece = rest + piece
        cut = len(piece)
        if not piece.endswith(b"\n") and cut >= PLAIN_DOCUMENT_BYTES:
            # The last character may continue in the next piece: at most 3 bytes 10xxxxxx follow its first.
            cut -= next((back for back in range(1, 5) if piece[-back] & 0xC0 != 0x80), 0)
        rest = piece[cut:]
        yield number, piece[:cut]
        number += piece.endswith(b"\n")
    if rest:
        yield number, rest
