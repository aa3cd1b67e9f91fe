"""The progress of encoding as lines of a log, for a process without a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Called with a domain, the bytes and documents that are encoded, and about how many bytes the domain has.
Progress = Callable[[str, int, int, int], None]
_LINE_SECONDS = 10.0


def logged_progress(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a function that logs how much of a domain is encoded, at most every 10 seconds."""
    domain, begin, last = "", 0.0, clock()

    def show(name: str, encoded_bytes: int, documents: int, expected: int) -> None:
        nonlocal domain, begin, last
        now = clock()
        if name != domain:
            domain, begin = name, now
        if now - last >= _LINE_SECONDS:
            last = now
            rate = encoded_bytes / 1e6 / max(now - begin, 1e-9)
            logger.info(
                "encoding %s: %s documents, %.1f of about %.1f MB of text%s",
                name,
                f"{documents:,}",
                encoded_bytes / 1e6,
                max(expected, encoded_bytes) / 1e6,
                f", {rate:.1f} MB/s" if now > begin else "",
            )

    return show
