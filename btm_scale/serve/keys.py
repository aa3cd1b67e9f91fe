"""API keys: a file with one per line, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from btm_scale.errors import UserError


class Keys:
    """The keys that a server accepts."""

    def __init__(self, keys: list[str]) -> None:
        # Digests have one length, so that a comparison does not show how long a key is.
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Read keys, one per line; lines that begin with # are comments. Raises UserError if there is none."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"Cannot read API keys from {path}: {error}. Give a text file with one key per line."
            ) from None
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise UserError(f"{path} has no API key. Write at least one, one per line.")
        return cls(keys)

    def accept(self, header: str | None) -> bool:
        """Whether the value of an Authorization header is `Bearer` and one of the keys."""
        scheme, _, key = (header or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
