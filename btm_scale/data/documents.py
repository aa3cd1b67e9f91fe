"""Read documents from files of every format in constant memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from btm_scale.config.data import DomainConfig
from btm_scale.data.existing_tokens import read_existing
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.compression import BROKEN_STREAM
from btm_scale.data.formats.read import READERS, UNITS
from btm_scale.data.formats.sense import format_of, holds_rows, promised_format
from btm_scale.data.sources import DomainSource
from btm_scale.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A text with its origin (file and line). Documents with the same `split_key` stay in one split."""

    text: str
    split_key: str | None
    origin: str
    ids: np.ndarray[Any, Any] | None = field(default=None, compare=False)  # if it comes from token files


@dataclass
class Loss:
    """What was skipped of a file: the number of its bad lines, the first of them, and where the rest was lost."""

    lines: int = 0
    first: str = ""
    lost_after: str = ""
    documents: int = 0  # that were read

    def __str__(self) -> str:
        lines = f"{self.lines:,} bad line{'s' if self.lines > 1 else ''}, the first: {self.first}"
        read = f"; {self.documents:,} document{'s' if self.documents != 1 else ''} read"
        return lines + (f"; everything after {self.lost_after} is lost" if self.lost_after else "") + read


class BadLines:
    """The policy for lines without a valid text: raise an error at the first, or skip them and count them by file."""

    def __init__(self, policy: Literal["error", "skip"] = "error") -> None:
        self.policy = policy
        self.losses: dict[str, Loss] = {}
        self._read: dict[str, int] = {}

    @property
    def skipped(self) -> int:
        """The number of skipped lines; a damaged file counts as one."""
        return sum(loss.lines for loss in self.losses.values())

    def __call__(
        self, file: SourceFile, line: int, why: str, remedy: str = "", *, unit: str = "line", damaged: bool = False
    ) -> None:
        """Handle a bad line, numbered from 1. `remedy` is the first one to try; `damaged` files end there."""
        if self.policy == "error":
            fix = f"{remedy}, fix the {unit}" if remedy else f"Fix the {unit}"
            raise DataError(
                f"{file.path}, {unit} {line}: {why}. {fix}, or set data.on_bad_line to skip, which drops and counts "
                "such lines."
            )
        loss = self.losses.setdefault(file.name, Loss())
        loss.lines += 1
        loss.first = loss.first or f"{unit} {line}: {why}"
        if damaged:
            loss.lost_after = f"{unit} {line - 1:,}"

    def end_of_file(self, file: SourceFile, documents: int) -> None:
        """Note how much was read of a file. Raises DataError if bad lines left nothing of it."""
        self._read[file.name] = documents
        loss = self.losses.get(file.name)
        if loss is None:
            return
        loss.documents = documents
        if not documents:
            raise DataError(
                f"Nothing was read of {file.path}: {loss.lines:,} bad line{'s' if loss.lines > 1 else ''}, the first: "
                f"{loss.first}. data.on_bad_line: skip may drop lines, never a whole file. Correct the file, set the "
                "domain's format or field, or remove the file from its text."
            )

    def add(self, refused: BadLines) -> None:
        """Add lines that were read as documents and refused afterwards."""
        for name, loss in refused.losses.items():
            total = self.losses.setdefault(name, Loss(documents=self._read.get(name, 0)))
            total.lines += loss.lines
            total.first = total.first or loss.first
            total.documents = max(0, total.documents - loss.lines)

    def warn(self, domain: str) -> None:
        """Log a warning for each file that lost something."""
        for name, loss in self.losses.items():
            logger.warning("Domain '%s': skipped in %s: %s", domain, name, loss)


def empty_domain(source: DomainSource, bad_lines: BadLines) -> DataError:
    """Return the error for a domain without documents."""
    skipped = bad_lines.skipped
    first = next((f"{name}, {loss.first}" for name, loss in bad_lines.losses.items()), "")
    lines = f" ({skipped:,} bad line{'s' if skipped > 1 else ''} skipped, the first: {first})" if skipped else ""
    filtered = " that meets its filter" if source.settings.filter else ""
    remedy = "Add text, change the filter" if filtered else "Add text"
    return DataError(
        f"Domain '{source.name}' is empty: its {len(source.files)} files hold no document{filtered}{lines}. {remedy}, "
        "or remove the domain."
    )


def read_documents(source: DomainSource, on_bad_line: BadLines) -> Iterator[Document]:
    """Yield every document of a domain, in the order of the file names; with `max_bytes`, a sample of every file.

    Raises DataError, which names the domain, for files it cannot read.
    """
    limit = source.settings.max_bytes
    if limit is None:
        for file in source.files:
            yield from read_file_of(source, file, on_bad_line)
        return
    left = float(limit)
    sizes = [expected_bytes(file) for file in source.files]
    unread = sum(sizes)
    for file, file_size in zip(source.files, sizes, strict=True):
        allowance = left * file_size / unread
        unread -= file_size
        for document in read_file_of(source, file, on_bad_line):
            size = len(document.text.encode())
            if size > allowance and left < limit:
                break
            yield document
            allowance -= size
            left -= size
            if allowance <= 0:
                break


def expected_bytes(file: SourceFile) -> int:
    """Return about how much text a file has, from its size on disk."""
    packed = file.compressed or promised_format(file) == "parquet"
    return max(1, file.stat().st_size * (3 if packed else 1))


def expected_bytes_of(source: DomainSource) -> int:
    """Return about how many bytes of text are read of a domain."""
    size = sum(map(expected_bytes, source.files))
    return min(size, source.settings.max_bytes or size)


def read_file_of(source: DomainSource, file: SourceFile, on_bad_line: BadLines) -> Iterator[Document]:
    """Yield the documents of one of a domain's files. Raises as `read_documents` does."""
    try:
        if not source.settings.token_files:
            yield from read_file(file, source.settings, on_bad_line)
        elif file.path.suffix == ".bin":
            file.stat()
            for number, text, ids in read_existing(file.path, source.tokenizer):
                if text and not text.isspace():
                    yield Document(text, None, f"{file.name}:{number}", ids)
    except DataError as error:
        raise DataError(f"Domain '{source.name}': {error}") from None


def read_file(file: SourceFile, settings: DomainConfig, on_bad_line: BadLines) -> Iterator[Document]:
    """Yield the documents of one file that contain more than whitespace.

    Raises DataError at a bad line, unless it is skipped, and for a file of which bad lines leave nothing.
    """
    file.stat()  # a missing file is an error, not a bad line
    line, count, unit = 0, 0, "line"
    remedy_for_text = ""

    def bad(number: int, why: str, remedy: str = "", *, damaged: bool = False) -> None:
        on_bad_line(file, number, why, remedy and remedy + remedy_for_text, unit=unit, damaged=damaged)

    by_file = settings.split_by == "file"
    try:
        format = format_of(file, settings)
        unit = UNITS.get(format, "line")
        if holds_rows(format) and promised_format(file) in ("text", "json"):
            remedy_for_text = ", set its `format` to text if the file holds no rows"
        if holds_rows(format) and settings.passages is not None:
            raise DataError(
                f"{file.path} holds rows, and `passages` cuts plain text only. Each row is a document: remove "
                "`passages` from the domain, or set its `format` to text."
            )
        for line, text, split_key in READERS[format](file, settings, bad):
            if text and not text.isspace():
                count += 1
                yield Document(text, file.name if by_file else split_key, f"{file.name}:{line}")
    except BROKEN_STREAM as error:
        # Nothing after the damage is readable.
        bad(line + 1, f"the file is damaged from here on ({type(error).__name__}: {error})", damaged=True)
    if not settings.filter:  # which may exclude every row that can be read
        on_bad_line.end_of_file(file, count)
