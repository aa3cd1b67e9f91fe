"""The text that every method is judged on: the same tokens, in the same order, for all of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.tokenizer import Tokenizer, directory_digest
from btm_scale.run_dir import RunDir
from btm_scale.util.imports import import_uncompiled

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EvaluationText:
    """Documents of a split, one after another, cut into blocks that are predicted on their own.

    Block b has the inputs `tokens[start : end]` and the targets `tokens[start + 1 : end + 1]`, where start is
    `block_starts[b]` and end the next block's start; the last block may be shorter.
    """

    domain: str
    split: str
    tokens: Array
    """int64 [targets + 1]"""
    block_starts: Array
    """int64 [blocks]: 0, sequence_length, 2 x sequence_length, ..."""
    fingerprint: str
    """Hex digest of the tokens and where blocks start."""
    tokenizer: Path
    """The directory of the tokenizer that made the tokens."""

    @property
    def targets(self) -> Array:
        """int64 [targets]: what is predicted, in order."""
        return self.tokens[1:]

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the targets' text; the end of a document has none."""
        return _text_bytes(_tokenizer(self.tokenizer, directory_digest(self.tokenizer)), self.targets)

    @classmethod
    def load(cls, run: RunDir, domain: str, split: str, *, tokens: int, sequence_length: int) -> EvaluationText:
        """At most `tokens` targets from a domain's split, documents in a fixed random order.

        Raises DataError if the domain isn't prepared, was with another tokenizer than the run's, or is damaged.
        """
        # Megatron-core takes seconds to import, and who judges scores may need no text.
        import_uncompiled("megatron.core")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        tokenizer = directory_digest(run.tokenizer)
        made = Fingerprint.of_domain(run, domain)
        made.require_tokenizer(tokenizer, run)
        made.require_whole(run)
        text = _sample(IndexedDataset(str(run.tokens(domain, split))), tokens + 1)
        starts = np.arange(0, len(text) - 1, sequence_length, dtype=np.int64)
        digest = hashlib.sha256(json.dumps([domain, split, sequence_length, tokenizer]).encode())
        digest.update(text.astype("<i8").tobytes())
        return cls(domain, split, text, starts, digest.hexdigest(), run.tokenizer)


def _sample(documents: IndexedDataset, tokens: int) -> Array:
    # RandomState's stream is frozen by NumPy's policy; another order would be another test.
    parts: list[Array] = []
    for document in np.random.RandomState(0).permutation(len(documents)):
        parts.append(documents[int(document)].astype(np.int64))
        tokens -= len(parts[-1])
        if tokens <= 0:
            break
    text = np.concatenate(parts)
    return text[: len(text) + min(tokens, 0)]


@lru_cache(maxsize=1)
def _tokenizer(directory: Path, digest: str) -> Tokenizer:
    """Loaded once for all of a run's texts."""
    return Tokenizer.load(directory)


def _text_bytes(tokenizer: Tokenizer, ids: Array) -> int:
    """By document, for a decoder may treat the start of a text apart."""
    ends = np.flatnonzero(ids == tokenizer.eos)
    return sum(
        len(tokenizer.decode(document[document != tokenizer.eos].tolist()).encode()) for document in np.split(ids, ends)
    )
