"""API keys: a file with one per line, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from btm_scale.errors import UserError
from btm_scale.serve.hosts import is_header_text
from btm_scale.util.bounded_json import read_bounded

logger = logging.getLogger(__name__)

_MOST_BYTES = 1 << 20


class Keys:
    """The keys that a server accepts."""

    def __init__(self, keys: list[str]) -> None:
        # Digests have one length, so that a comparison does not show how long a key is.
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read keys, one per line; lines that begin with # are comments.

        A file that other users may read is reported. Raises UserError for a file without keys, or with one that no
        header may have.
        """
        try:
            content = read_bounded(path, _MOST_BYTES).decode("utf-8-sig")  # editors on Windows write a mark first
            others = path.stat().st_mode & 0o077
        except UnicodeDecodeError:  # whose text would repeat a part of the file
            raise UserError(
                f"Cannot read API keys from {path}: it is not UTF-8 text. Give a text file with one key per line."
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"Cannot read API keys from {path}: {error}. Give a text file with one key per line."
            ) from None
        lines = {number: line.strip() for number, line in enumerate(content.split("\n"), 1)}
        keys = {number: line for number, line in lines.items() if line and not line.startswith("#")}
        for number, key in keys.items():
            if not is_header_text(key):
                raise UserError(
                    f"The API key in line {number} of {path} has characters that no HTTP header may have. Use letters, "
                    "digits and punctuation of ASCII."
                )
        if not keys:
            raise UserError(f"{path} has no API key. Write at least one, one per line.")
        if others:
            logger.warning("Other users may read the API keys in %s. Restrict it: chmod 600", path)
        return cls(list(keys.values()))

    def accept(self, header: str | None) -> bool:
        """Whether the value of an Authorization header is `Bearer` and one of the keys."""
        scheme, _, key = (header or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
