"""Text files: their names and uncompressed contents."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from btm_scale.data.formats.compression import compression_of, open_uncompressed
from btm_scale.errors import DataError


@dataclass(frozen=True)
class SourceFile:
    """A file of text. `name` is its path relative to the text root, so it stays valid when the root moves."""

    path: Path
    name: str

    @property
    def compressed(self) -> bool:
        """Whether the content is compressed."""
        try:
            with self.path.open("rb") as file:
                return compression_of(file.read(16), self.path) is not None
        except OSError:
            return False

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
        with open_uncompressed(self.path) as stream:
            yield stream

    @contextlib.contextmanager
    def open_seekable(self) -> Iterator[BinaryIO]:
        """Open the uncompressed contents with random access; a compressed file is first unpacked to disk."""
        with self.open() as stream:
            if not self.compressed and stream.seekable():
                yield stream
                return
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked, 1 << 20)
                unpacked.seek(0)
                yield unpacked


def is_utf8(text: str) -> bool:
    """Return whether a string is valid UTF-8; Python decodes invalid bytes of file names to lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
