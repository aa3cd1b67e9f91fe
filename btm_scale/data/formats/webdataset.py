"""WebDataset: a tar whose consecutive members with the same name, up to the first dot, are a row."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.rows import LONGEST_LINE_BYTES, Fields, NoFieldError, Report, Row
from btm_scale.util.bounded_json import parse_json

_BLOCK = 512
_LONGEST_HEADER = 1 << 20  # of extended headers, which hold long names
_COPY = 1 << 20


def read_webdataset(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the rows of a tar.

    A row has the fields of its `.json` member, and one field per text member, named by its extension; that of a `.txt`
    is also called `text`.
    """
    fields = Fields(settings)
    wanted = {name.partition(".")[0] for name in fields.names} | set(fields.names) | {"json", "txt"}
    sample: _Sample | None = None
    number = 0
    with file.open() as stream:
        for name, size in _members(stream):
            key, extension = _split_name(name)
            if sample is None or sample.key != key:
                if sample is not None:
                    yield from sample.rows(fields, bad)
                number += 1
                sample = _Sample(number, key)
            if extension not in wanted:
                _skip(stream, _padded(size))
            elif size > LONGEST_LINE_BYTES:
                sample.problem = f"{name} is longer than {LONGEST_LINE_BYTES >> 20} MiB"
                _skip(stream, _padded(size))
            else:
                sample.add(name, extension, _read(stream, size))
                _skip(stream, _padded(size) - size)
        if sample is not None:
            yield from sample.rows(fields, bad)


class _Sample:
    """The members of one row."""

    def __init__(self, number: int, key: str) -> None:
        self.number, self.key = number, key
        self.problem = ""
        self._row: dict[str, Any] = {}

    def add(self, name: str, extension: str, content: bytes) -> None:
        """Add a member's content to the row."""
        try:
            if extension == "json":
                values = parse_json(content, unique_keys=False, unicode=False)
                if not isinstance(values, dict):
                    raise ValueError(f"expected a JSON object, found {type(values).__name__}")
                self._row |= values
                return
            text = content.decode("utf-8-sig")
            self._row[extension] = text
            if extension == "txt":
                self._row.setdefault("text", text)
        except UnicodeDecodeError as error:
            self.problem = f"{name} is not UTF-8 at byte {error.start}"
        except ValueError as error:
            self.problem = f"{name}: {error}"

    def rows(self, fields: Fields, bad: Report) -> Iterator[Row]:
        """Yield the row, if it has a text that no filter excludes."""
        try:
            if self.problem:
                raise ValueError(self.problem)
            if (found := fields(self._row)) is not None:
                yield (self.number, *found)
        except NoFieldError as error:
            bad(self.number, f"'{self.key}' has {error}", error.remedy)
        except ValueError as error:
            bad(self.number, str(error))


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _members(stream: BinaryIO) -> Iterator[tuple[str, int]]:
    """Yield the name and size of each regular file; the caller reads its padded content before the next.

    Not by `tarfile`, which reads extended headers of any size into memory.
    """
    long_name = ""
    extended: Mapping[str, str] = {}
    while True:
        header = _read(stream, _BLOCK, may_end=True)
        if not header or not header.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise OSError(f"not a tar header ({error})") from None
        if member.size < 0:
            raise OSError("a tar member has a negative size")
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if member.size > _LONGEST_HEADER:
                raise OSError(f"a tar header is longer than {_LONGEST_HEADER >> 20} MiB")
            content = _read(stream, member.size)
            _skip(stream, _padded(member.size) - member.size)
            if member.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "replace")
            elif member.type == tarfile.XHDTYPE:
                extended = _extended(content)
            continue
        name, size = long_name or member.name, member.size
        if extended:
            name = extended.get("path", name)
            size = _size(extended.get("size"), size)
        long_name, extended = "", {}
        if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield name, size
        elif member.type == tarfile.GNUTYPE_SPARSE:
            raise OSError("a tar member is a sparse file, which is not read")
        else:  # a folder or a link, which has no content
            _skip(stream, _padded(size))


def _extended(content: bytes) -> Mapping[str, str]:
    """Return the records of a pax header, each `length key=value` and a newline."""
    records, position = {}, 0
    while position < len(content) and content[position : position + 1] != b"\0":
        length, _, _ = content[position : position + 20].partition(b" ")
        if not length.isdigit() or int(length) < 5:
            raise OSError("an extended tar header is invalid")
        record = content[position + len(length) + 1 : position + int(length) - 1]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        position += int(length)
    return records


def _size(text: str | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise OSError("an extended tar header has an invalid size")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _read(stream: BinaryIO, size: int, *, may_end: bool = False) -> bytes:
    content = stream.read(size)
    if len(content) < size and not (may_end and not content):
        raise EOFError("the end of the tar is missing")
    return content


def _skip(stream: BinaryIO, size: int) -> None:
    while size > 0:
        piece = stream.read(min(size, _COPY))
        if not piece:
            raise EOFError("the end of the tar is missing")
        size -= len(piece)
