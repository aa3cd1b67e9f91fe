"""Which files a domain's text lies in, and how their bytes are opened."""

from __future__ import annotations

import contextlib
import glob
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

from btm_scale.config.run import DomainConfig, RunConfig
from btm_scale.errors import DataError

_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class SourceFile:
    """A file of text. `name` is its path below the text root, so that it outlives a move of the root."""

    path: Path
    name: str

    @property
    def format(self) -> str:
        """The suffix that decides how the file is read, compression taken off."""
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
        """Whether every row is a document, and not the file."""
        return self.format in (".jsonl", ".ndjson", ".parquet")

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The uncompressed bytes, as a stream."""
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
        """The uncompressed bytes with random access; a compressed file is unpacked to disk for that."""
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


def resolve(domain: str, config: DomainConfig, text_root: Path) -> list[SourceFile]:
    """The files of a domain, each once, sorted by name.

    Raises DataError that names every path or glob which matches no readable file.
    """
    found: dict[str, SourceFile] = {}
    problems = []
    for pattern in config.text:
        matches = _matches(text_root / pattern)
        files = [path for path in matches if path.is_file()]
        if not files:
            problems.append(_why_nothing(domain, pattern, text_root, matches))
        for path in files:
            if not os.access(path, os.R_OK):
                problems.append(f"domain '{domain}': {path} cannot be read; give yourself permission or leave it out")
            name = path.relative_to(text_root).as_posix() if path.is_relative_to(text_root) else str(path)
            if not is_utf8(name):
                problems.append(f"domain '{domain}': the name of {name!r} is not UTF-8; give the file another")
            found[name] = SourceFile(path, name)
    if problems:
        raise DataError("\n".join(problems))
    return [found[name] for name in sorted(found)]


def is_utf8(text: str) -> bool:
    """Whether a string can be written down: Python hides bytes that are no text in halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _matches(pattern: Path) -> list[Path]:
    # A file whose name has a bracket or a star is meant literally if it exists.
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return [pattern] if pattern.exists() else []
    # glob, unlike Path.glob, takes patterns that are absolute.
    return [Path(path) for path in glob.iglob(str(pattern), recursive=True)]  # noqa: PTH207


def _why_nothing(domain: str, pattern: str, text_root: Path, matches: list[Path]) -> str:
    start = f"domain '{domain}': '{pattern}' matches no file below {text_root}"
    if matches:
        return f"{start}, only folders; name files in them, such as '{pattern.rstrip('/')}/**/*.txt'"
    return f"{start}; correct the path, or set text_root to the folder that it is relative to"


def require_text(config: RunConfig) -> dict[str, list[SourceFile]]:
    """The files of every domain, or one DataError with all that is wrong."""
    files, problems = {}, []
    for name, domain in config.all_domains.items():
        try:
            files[name] = resolve(name, domain, config.text_root)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return files
