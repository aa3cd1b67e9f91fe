"""Which format a file has: as its domain says, or as its first bytes show, whatever its name."""

from __future__ import annotations

import codecs
import re
from typing import BinaryIO

from btm_scale.config.data import DomainConfig, Format
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.compression import (
    BROKEN_STREAM,
    NotCompressedError,
    promised_compression,
    without_compression,
)
from btm_scale.data.formats.rows import Fields
from btm_scale.data.formats.tables import looks_like_table
from btm_scale.errors import DataError
from btm_scale.util.bounded_json import parse_json

_HEAD_BYTES = 1 << 16
_SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab"), "tsv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
_NAMES: dict[Format, str] = {
    "jsonl": "JSON lines",
    "json": "JSON objects over several lines, or an array of them",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "webdataset": "a tar",
}
_ROWS = frozenset({"jsonl", "json", "csv", "tsv", "parquet", "arrow", "webdataset"})
_UNREADABLE = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text"),
    (rb"ORC", "an ORC table"),
    (rb"Obj\x01", "an Avro file"),
    (rb"SQLite format 3\0", "an SQLite database"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (rb"%PDF-", "a PDF"),
    (rb"\xd0\xcf\x11\xe0", "an Office document"),
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OBJECT = re.compile(rb'\{\s*"(?:[^"\\]|\\.)*+"\s*:', re.DOTALL)
_ARRAY_OF_OBJECTS = re.compile(rb'\[\s*\{\s*(["}]|\Z)')


def holds_rows(format: Format) -> bool:
    """Return whether each row of a file is a document; otherwise the file is one, or its passages are."""
    return format in _ROWS


def format_of(file: SourceFile, settings: DomainConfig) -> Format:
    """Return the format in which a file is read.

    Raises DataError if the file is certainly of a format other than the domain's, or of one that cannot be read, and
    NotCompressedError if only its name says that it is compressed.
    """
    promised = promised_format(file)
    try:
        with file.open() as stream:
            head = _head(stream)
    except BROKEN_STREAM:  # reported with its line when the file is read
        return promised if settings.format == "auto" else settings.format
    certain = _certain(file, head)
    if certain is None and head and promised_compression(file.path) is not None and not file.compressed:
        raise NotCompressedError(f"its name ends in {file.path.suffix}, and its content is not compressed")
    if settings.format != "auto":
        _require(file, settings.format, certain)
        return settings.format
    if certain == "json" and promised == "jsonl" and not _is_array(head):
        return "jsonl"  # whose first line is broken, which is reported with its number
    if certain is None and promised == "text":
        cut = len(head) == _HEAD_BYTES
        return looks_like_table(_text(head), list(Fields(settings).names), cut=cut) or "text"
    return certain or promised


def promised_format(file: SourceFile) -> Format:
    """Return the format that a file's name promises; most names promise plain text."""
    suffixes = without_compression(file.path)
    return _SUFFIXES.get(suffixes[-1], "text") if suffixes else "text"


def _head(stream: BinaryIO) -> bytes:
    head = b""
    while len(head) < _HEAD_BYTES and (piece := stream.read(_HEAD_BYTES - len(head))):
        head += piece
    return head


def _certain(file: SourceFile, head: bytes) -> Format | None:
    """Return the format that the first bytes prove, or None: plain text and tables have no such mark."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1") or (head[:4] == b"\xff\xff\xff\xff" and head[7:8] == b"\0"):
        return "arrow"
    if head[257:262] == b"ustar":
        return "webdataset"
    if head.startswith(_LFS_POINTER):
        raise DataError(
            f"{file.path} is a Git LFS pointer, not the file itself. Text is read from complete files: run "
            "`git lfs pull` in its repository."
        )
    if not _is_text(head):
        for pattern, what in _UNREADABLE:
            if re.match(pattern, head):
                raise DataError(
                    f"{file.path} is {what}, which is not read. Text must be UTF-8, alone or as the rows of a table: "
                    "convert the file."
                )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _ARRAY_OF_OBJECTS.match(start):
        return "json"
    if not _OBJECT.match(start):
        return None
    lines = start.split(b"\n", 3)
    if len(lines) == 1 and len(head) == _HEAD_BYTES:
        return "jsonl"  # the first object is long, and on one line so far
    return "jsonl" if any(_is_object(line) for line in lines[:3]) else "json"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line, unique_keys=False, unicode=False), dict)
    except ValueError:
        return False


def _text(head: bytes) -> str:
    """Return the first bytes as text without an incomplete last character; "" if they are not text."""
    return codecs.getincrementaldecoder("utf-8-sig")().decode(head) if _is_text(head) else ""


def _is_text(head: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()  # the last character may be incomplete
    try:
        decoder.decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def _is_array(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _require(file: SourceFile, asked: Format, certain: Format | None) -> None:
    """Raise DataError if a file is certainly of another format than the one asked for."""
    if certain is None:
        if asked not in ("parquet", "arrow"):
            return
        raise DataError(
            f"{file.path} is not {_NAMES[asked]}, which `format: {asked}` asks for. Correct the domain's format, "
            "or remove it: the format of each file is then detected."
        )
    # Every byte of JSON can be read as text, and JSON lines are JSON values one after another.
    if asked == certain or (certain in ("jsonl", "json") and asked == "text") or (certain, asked) == ("jsonl", "json"):
        return
    raise DataError(
        f"{file.path} holds {_NAMES[certain]}, and `format: {asked}` of the domain asks for another format. Set it to "
        f"{certain}, or remove it: the format of each file is then detected."
    )
