"""Text files: their names, formats and uncompressed contents."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from btm_scale.errors import DataError

_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class SourceFile:
    """A file of text. `name` is its path relative to the text root, so it stays valid when the root moves."""

    path: Path
    name: str

    @property
    def format(self) -> str:
        """The suffix that determines how the file is read, without the suffix of its compression."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        if suffixes and suffixes[-1] in _COMPRESSED:
            suffixes.pop()
        return suffixes[-1] if suffixes else ""

    @property
    def compressed(self) -> bool:
        """Whether the file is .gz or .zst."""
        return self.path.suffix.lower() in _COMPRESSED

    @property
    def holds_rows(self) -> bool:
        """Whether each row is a document; otherwise the whole file is."""
        return self.format in (".jsonl", ".ndjson", ".parquet")

    def stat(self) -> os.stat_result:
        """Return the file's status. Raises DataError if the file is gone."""
        try:
            return self.path.stat()
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read any more ({error.strerror}). The text of a run must exist until it is "
                "encoded. Restore the file, or rerun without it."
            ) from None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the uncompressed contents as a stream."""
        suffix = self.path.suffix.lower()
        with self.path.open("rb") as raw:
            if suffix == ".gz":
                with gzip.open(raw) as stream:
                    yield cast(BinaryIO, stream)
            elif suffix == ".zst":
                with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as reader:
                    yield _buffered(reader)
            else:
                yield raw

    @contextlib.contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """Open the uncompressed contents with random access; a compressed file is first unpacked to disk."""
        with self.open() as stream:
            if not self.compressed:
                yield stream
                return
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked, 1 << 20)
                unpacked.seek(0)
                yield unpacked


def _buffered(reader: zstandard.ZstdDecompressionReader) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, reader), 1 << 20))


def is_utf8(text: str) -> bool:
    """Return whether a string is valid UTF-8; Python decodes invalid bytes of file names to lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
