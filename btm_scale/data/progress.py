"""The progress of preparing text as lines of a log, for a process without a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

logger = logging.getLogger(__name__)

# Called with a domain, the bytes and documents that are encoded, and about how many bytes the domain has. Other steps
# have a name with a space, which no domain has. 0 bytes are expected of steps whose progress is unknown.
Progress = Callable[[str, int, int, int], None]
SAMPLE = "reading a sample"
TRAINING = "training a tokenizer"
CHECKING = "checking {}"
CLUSTERING = "clustering documents"
ASSIGNING = "assigning documents"
_LINE_SECONDS = 10.0
_REPORTED_AT_ONCE = 1 << 20  # bytes that are read


def reported(
    items: Iterable[Item], size_of: Callable[[Item], int], name: str, expected: int, on_progress: Progress
) -> Iterator[Item]:
    """Yield the items, and report how much of about `expected` bytes has been read.

    `size_of` may return characters, which are counted faster: of text that is not ASCII, less is then reported.
    """
    size = last = 0
    for number, item in enumerate(items, start=1):
        size += size_of(item)
        if size - last >= _REPORTED_AT_ONCE:
            last = size
            on_progress(name, size, number, expected)
        yield item


def logged_progress(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a function that logs how much of a domain is encoded, or read, at most every 10 seconds."""
    domain, begin, last = "", 0.0, clock()

    def show(name: str, encoded_bytes: int, documents: int, expected: int) -> None:
        nonlocal domain, begin, last
        now = clock()
        if name != domain:
            domain, begin = name, now
        if expected and now - last >= _LINE_SECONDS:
            last = now
            rate = encoded_bytes / 1e6 / max(now - begin, 1e-9)
            logger.info(
                "%s: %s documents, %.1f of about %.1f MB of text%s",
                name if " " in name else f"encoding {name}",
                f"{documents:,}",
                encoded_bytes / 1e6,
                max(expected, encoded_bytes) / 1e6,
                f", {rate:.1f} MB/s" if now > begin else "",
            )

    return show
