"""Assignment of documents to splits by a hash, so that adding files moves no document.

If a split would stay empty, because the documents are few, the hash's ranges are moved to hold at least one each; one
or two documents are cut instead, and their end is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from btm_scale.config.data import DataConfig
from btm_scale.data.documents import BadLines, Document, read_documents
from btm_scale.data.sources import DomainSource
from btm_scale.run_dir import SPLITS


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


class Placement(Protocol):
    """How the documents of a domain are placed in splits."""

    @property
    def name(self) -> str:
        """`""` for the hash ranges that every domain has, so that equal texts are in the same split everywhere."""

    def placed(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Identity]]:
        """Yield all documents of the domain, given in their order, with their splits."""


def identify(document: Document, *, dev: float, test: float) -> Identity:
    """Place a document by the hash of its split key, or of its text if it has none.

    `dev` and `test` are fractions of the hash range. Equal texts (or split keys) are in the same split in every domain
    and every run.
    """
    return _identify(document, test, test + dev)


def _identify(document: Document, test_below: float, dev_below: float) -> Identity:
    text = document.text.encode()
    digest = decisive = hashlib.blake2b(text, digest_size=16).digest()
    if document.split_key is not None:
        decisive = hashlib.blake2b(document.split_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = _place(decisive)
    split = "test" if place < test_below else "dev" if place < dev_below else "train"
    return Identity(split, document.split_key, digest, len(text))


def _place(decisive: bytes) -> float:
    return int.from_bytes(decisive[:8], "little") / 2.0**64


@dataclass(frozen=True)
class ByHash:
    """The range of the hash below `test_below` is test, the next below `dev_below` is dev, and the rest is train."""

    test_below: float
    dev_below: float
    name: str = ""

    def placed(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Identity]]:
        """Yield the documents with their splits."""
        for document in documents:
            yield document, _identify(document, self.test_below, self.dev_below)


@dataclass(frozen=True)
class ByPosition:
    """The end of a text of `total` bytes is test, the part before it is dev, and the rest is train.

    A document that crosses a border is cut there: at a blank line, line end or space if one is near.
    """

    total: int
    dev: float
    test: float
    name: str = "position"

    def placed(self, documents: Iterable[Document]) -> Iterator[tuple[Document, Identity]]:
        """Yield the documents, or their parts, with their splits."""
        borders = {"train": self.total * (1 - self.dev - self.test), "dev": self.total * (1 - self.test)}
        slack = round(self.total * min(self.dev, self.test) / 4)
        split, start = "train", 0
        for document in documents:
            rest = document.text
            while rest:
                border = borders.get(split)
                size = len(rest.encode())
                cut = len(rest)
                if border is not None and start + size > border:
                    cut = _cut(rest, max(0, round(border) - start), slack)
                part, rest = rest[:cut], rest[cut:]
                start += len(part.encode())
                if part and not part.isspace():
                    yield self._part(document, part, split)
                if rest:
                    split = SPLITS[SPLITS.index(split) + 1]

    def _part(self, document: Document, text: str, split: str) -> tuple[Document, Identity]:
        encoded = text.encode()
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        ids = document.ids if text == document.text else None  # a part is encoded anew
        return replace(document, text=text, ids=ids), Identity(split, document.split_key, digest, len(encoded))


def _cut(text: str, at: int, slack: int) -> int:
    """Return the character at which to cut a text near byte `at`, at most `slack` bytes before it."""
    before = text.encode()[:at].decode(errors="ignore")
    nearest = len(before.encode()[: max(0, at - slack)].decode(errors="ignore"))
    for separator in ("\n\n", "\n", " "):
        if (found := before.rfind(separator, nearest)) >= 0:
            return found + len(separator)
    return len(before)


def placement_of(source: DomainSource, data: DataConfig, needed: Sequence[str]) -> Placement:
    """Return how a domain is placed so that none of the `needed` splits is empty, as far as its text allows.

    Reads documents until every such split has one: of most domains few, of a small one all.
    """
    usual = ByHash(data.test, data.test + data.dev)
    by_position = source.settings.split_by == "position"
    filled: set[str] = set()
    sizes: dict[float, int] = {}  # bytes by place
    for _, identity in usual.placed(read_documents(source, BadLines(data.on_bad_line))):
        filled.add(identity.split)
        place = _place(_decisive(identity))
        sizes[place] = sizes.get(place, 0) + identity.bytes
        if filled.issuperset(needed) and not by_position:
            return usual
    total = sum(sizes.values())
    if by_position or (0 < len(sizes) < 3 and source.may_be_cut):
        return ByPosition(total, data.dev, data.test)
    return _moved(sizes, data) if len(sizes) >= 3 else usual


def _decisive(identity: Identity) -> bytes:
    if identity.split_key is None:
        return identity.digest
    return hashlib.blake2b(identity.split_key.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _moved(sizes: dict[float, int], data: DataConfig) -> ByHash:
    """Return ranges of which each has at least one place; `sizes` has the bytes at each of at least three places."""
    places = sorted(sizes)
    total = sum(sizes.values())
    borders = []
    first = 0
    for share, left in ((data.test, 2), (data.dev, 1)):  # `left`: how many places must remain
        held = 0
        while first < len(places) - left and (not held or held + sizes[places[first]] / 2 < share * total):
            held += sizes[places[first]]
            first += 1
        borders.append(places[first])
    return ByHash(borders[0], borders[1], "moved")
