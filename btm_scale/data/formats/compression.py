"""Decompress a file of text, recognized by its first bytes. Memory does not depend on what the file expands to."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, cast

import zstandard

from btm_scale.data.formats.zstd_frames import CompleteFrames
from btm_scale.errors import DataError

Compression = Literal["gzip", "zstd", "bz2", "xz"]

BROKEN_STREAM = (EOFError, OSError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)

_LONGEST_WINDOW = 1 << 31  # `zstd --long=31`, the longest that the format's reference implementation reads
_XZ_MEMORY = 1 << 30
_BUFFER = 1 << 20
_MAGIC: tuple[tuple[bytes, Compression], ...] = (
    (rb"\x1f\x8b\x08", "gzip"),
    (rb"\x28\xb5\x2f\xfd", "zstd"),
    (rb"[\x50-\x5f]\x2a\x4d\x18", "zstd"),  # a skippable frame, with which parallel compressors begin
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bz2"),
    (rb"\xfd7zXZ\0", "xz"),
)
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_UNREADABLE = (
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4"),
    (b"\x1f\x9d", "compressed with compress (.Z)"),
    (b"\xff\x06\x00\x00sNaPpY", "compressed with Snappy"),
)
_FIRST_BYTES = frozenset(bytes([byte]) for byte in (*b"\x1f\x28BP7R\x04\xfd\xff", *range(0x50, 0x60)))


class NotCompressedError(OSError):
    """A file whose name has the suffix of a compression, and whose content has not."""


def without_compression(path: Path) -> list[str]:
    """Return the suffixes of a name in lower case, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _SUFFIXES:
        suffixes.pop()
    return suffixes


def promised_compression(path: Path) -> Compression | None:
    """Return the compression that the name of a file promises."""
    return cast("Compression | None", _SUFFIXES.get(path.suffix.lower()))


def compression_of(head: bytes, path: Path) -> Compression | None:
    """Return the compression of a file that begins with `head`. Raises DataError for one that cannot be read."""
    if head[:1] not in _FIRST_BYTES:  # as of most files
        return None
    for pattern, name in _MAGIC:
        if re.match(pattern, head, re.DOTALL):
            return name
    for magic, what in _UNREADABLE:
        if head.startswith(magic):
            raise DataError(
                f"{path} is {what}, which is not read. Files may be compressed with gzip, zstd, bzip2 or xz: unpack it."
            )
    return None


@contextlib.contextmanager
def open_uncompressed(path: Path) -> Iterator[BinaryIO]:
    """Open the uncompressed contents of a file as a stream; its members or frames are read to the last one.

    Raises DataError for a compression that cannot be read. Reading raises one of `BROKEN_STREAM` for damage.
    """
    with path.open("rb") as raw:
        head = raw.read(16)
        raw.seek(0)
        compression = compression_of(head, path)
        if compression is None:
            yield raw
        elif compression == "gzip":
            with gzip.open(raw) as stream:
                yield cast(BinaryIO, io.BufferedReader(_Parts(stream)))  # small parts, as the standard library's
        elif compression == "bz2":
            with bz2.open(raw) as stream:
                yield cast(BinaryIO, io.BufferedReader(_Parts(stream)))  # small parts, as the standard library's
        elif compression == "xz":
            yield _buffered(_XzStream(raw))
        else:
            frames = zstandard.ZstdDecompressor(max_window_size=_LONGEST_WINDOW)
            with frames.stream_reader(cast(BinaryIO, CompleteFrames(raw)), read_across_frames=True) as reader:
                yield _buffered(cast(io.RawIOBase, reader))


def _buffered(reader: io.RawIOBase) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(reader, _BUFFER))


class _Parts(io.RawIOBase):
    """A file of gzip or bz2, whose own `readline` is in Python. A damaged file loses the part that was asked for."""

    def __init__(self, file: gzip.GzipFile | bz2.BZ2File) -> None:
        self._file = file

    def readable(self) -> bool:
        """Return True: the stream is for reading."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, or part of it. Returns 0 at the end of the last member."""
        return self._file.readinto1(buffer)


class _XzStream(io.RawIOBase):
    """The contents of concatenated xz streams; `lzma.open` limits no memory."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._waiting = b""
        self._decompressor: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        """Return True: the stream is for reading."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer, or part of it. Returns 0 at the end of the last stream."""
        while True:
            if self._decompressor is None and not self._next_stream():
                return 0
            decompressor = cast(lzma.LZMADecompressor, self._decompressor)
            if decompressor.needs_input and not self._waiting:
                self._waiting = self._raw.read(_BUFFER)
                if not self._waiting:
                    raise EOFError("the end of the xz stream is missing")
            content = decompressor.decompress(self._waiting, max_length=len(buffer))
            self._waiting = b""
            if decompressor.eof:
                self._waiting, self._decompressor = decompressor.unused_data, None
            if content:
                buffer[: len(content)] = content
                return len(content)

    def _next_stream(self) -> bool:
        """Start the next stream, after padding of zeros. Returns False at the end of the file."""
        self._waiting = self._waiting.lstrip(b"\0")
        while not self._waiting:
            piece = self._raw.read(_BUFFER)
            if not piece:
                return False
            self._waiting = piece.lstrip(b"\0")
        self._decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        return True
