"""Zstandard frames (RFC 8878): whether a file ends with a complete one, which the library does not check."""

from __future__ import annotations

from collections.abc import Generator
from typing import BinaryIO

_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = b"\x2a\x4d\x18"  # after a byte from 0x50 to 0x5f
_RLE = 1  # the type of a block whose content is one byte, repeated


class CompleteFrames:
    """A compressed stream that raises EOFError at its end if the last frame is incomplete."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._steps = _steps()
        self._needed, self._kept = next(self._steps)  # bytes up to the next step, and those that it reads
        self._start = b""
        self._between = True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        content = self._raw.read(size)
        if not content and not self._between:
            raise EOFError("the end of the last zstd frame is missing")
        self._follow(content)
        return content

    def _follow(self, content: bytes) -> None:
        at = 0
        while at < len(content):
            taken = min(self._needed, len(content) - at)
            if self._kept:
                self._start += content[at : at + taken]
            at += taken
            self._needed -= taken
            self._between = False
            while not self._needed:
                start, self._start = self._start, b""
                self._needed, self._kept = self._steps.send(start)
                self._between = self._kept == len(_MAGIC) + 1


def _steps() -> Generator[tuple[int, int], bytes, None]:
    """Yield how many bytes come next, and how many of them to send back; 5 is the start of a frame: magic and flags."""
    while True:
        start = yield len(_MAGIC) + 1, len(_MAGIC) + 1
        if start[1:4] == _SKIPPABLE:
            size = start[4:] + (yield 3, 3)
            yield int.from_bytes(size, "little"), 0
            continue
        if start[:4] != _MAGIC:
            while True:  # not a frame, which the library reports
                yield 1 << 62, 0
        descriptor = start[4]
        single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
        window = 1 - single
        dictionary = (0, 1, 2, 4)[descriptor & 3]
        content = (single, 2, 4, 8)[descriptor >> 6]
        yield window + dictionary + content, 0
        is_last = False
        while not is_last:
            header = int.from_bytes((yield 3, 3), "little")
            is_last = bool(header & 1)
            yield (1 if header >> 1 & 3 == _RLE else header >> 3), 0
        yield 4 * checksum, 0
