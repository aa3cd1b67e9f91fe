"""Assignment of documents to splits by a hash, so that adding files moves no document."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from btm_scale.data.documents import Document


@dataclass(frozen=True)
class Identity:
    """What is known of a document without its text: its split, its split key, and the text's 16-byte digest and size in
    UTF-8 bytes."""

    split: str
    split_key: str | None
    digest: bytes
    bytes: int

    @property
    def key(self) -> int:
        """64 bits of the digest; equal texts have equal keys."""
        return int.from_bytes(self.digest[8:], "little")


def identify(document: Document, *, dev: float, test: float) -> Identity:
    """Place a document by the hash of its split key, or of its text if it has none.

    `dev` and `test` are fractions of the hash range. Equal texts (or split keys) are in the same split in every domain
    and every run.
    """
    text = document.text.encode()
    digest = decisive = hashlib.blake2b(text, digest_size=16).digest()
    if document.split_key is not None:
        decisive = hashlib.blake2b(document.split_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(decisive[:8], "little") / 2.0**64
    split = "test" if place < test else "dev" if place < test + dev else "train"
    return Identity(split, document.split_key, digest, len(text))
