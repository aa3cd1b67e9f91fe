"""Plain text: a file is one document, or several if it is long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from btm_scale.config.data import DomainConfig
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.rows import Report, Row

PLAIN_DOCUMENT_BYTES = 4 << 20


def read_plain_text(file: SourceFile, settings: DomainConfig, bad: Report) -> Iterator[Row]:
    """Yield the documents of a plain text file, each with the number of its first line.

    A document ends at the first blank line after `passages` bytes (4 MiB by default), or at a line end if no blank line
    is near.
    """
    parts: list[str] = []
    size, first = 0, 1
    longest = settings.passages or PLAIN_DOCUMENT_BYTES
    with file.open() as stream:
        for number, line in _line_pieces(stream, longest):
            if not parts:
                first = number
            if first == number == 1 and b"\0" in line:
                bad(1, "a NUL byte: the file is binary, not text", damaged=True)
                return
            try:
                parts.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                bad(number, f"not UTF-8 at byte {error.start} of the line")
                continue
            size += len(line)
            if size >= 2 * longest or (size >= longest and line.isspace()):
                yield first, "".join(parts), None
                parts, size = [], 0
    if parts:
        yield first, "".join(parts), None


def _line_pieces(stream: BinaryIO, longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines; a line too long for memory comes in pieces, cut between characters."""
    longest = max(longest, 16)  # a character has up to 4 bytes
    number, rest = 1, b""
    while piece := stream.readline(longest):
        piece = rest + piece
        cut = len(piece)
        if not piece.endswith(b"\n") and cut >= longest:
            # The last character may continue in the next piece: at most 3 bytes 10xxxxxx follow its first.
            cut -= next((back for back in range(1, 5) if piece[-back] & 0xC0 != 0x80), 0)
        rest = piece[cut:]
        yield number, piece[:cut]
        number += piece.endswith(b"\n")
    if rest:
        yield number, rest
