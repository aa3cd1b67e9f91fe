"""Which split a document falls in, and whether its text was seen before: both by hash, so that adding files
moves nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from btm_scale.data.sources import Document


@dataclass(frozen=True)
class Identity:
    """A document's split, and its text's digest [16 bytes] and size in UTF-8 bytes."""

    split: str
    digest: bytes
    bytes: int

    @property
    def key(self) -> int:
        """64 bits of the digest; equal texts have equal keys."""
        return int.from_bytes(self.digest[8:], "little")


def identify(document: Document, *, dev: float, test: float) -> Identity:
    """Place a document by the hash of its split key, or of its text if it has none.

    `dev` and `test` are shares of the hash range. Equal texts (or groups) fall into the same split in every
    domain and every run.
    """
    text = document.text.encode()
    digest = decisive = hashlib.blake2b(text, digest_size=16).digest()
    if document.split_key is not None:
        decisive = hashlib.blake2b(document.split_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(decisive[:8], "little") / 2.0**64
    split = "test" if place < test else "dev" if place < test + dev else "train"
    return Identity(split, digest, len(text))


class TextDigest:
    """One digest of a stream of documents, their order and groups."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, identity: Identity, document: Document) -> None:
        """Take in the next document."""
        self._total.update(identity.digest + repr(document.split_key).encode())

    def hexdigest(self) -> str:
        """The digest of what was taken in."""
        return self._total.hexdigest()
