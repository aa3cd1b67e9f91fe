"""The evaluation text of a domain: every method is evaluated on the same tokens in the same order."""

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
    """Concatenated documents of a split, cut into blocks that are predicted independently.

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
    """Hex digest of the tokens and the block starts."""
    tokenizer: Path
    """The directory of the tokenizer that made the tokens."""

    @property
    def targets(self) -> Array:
        """The tokens that are predicted, int64 [targets]."""
        return self.tokens[1:]

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the targets' text, without the tokens around documents."""
        return _text_bytes(_tokenizer(self.tokenizer, directory_digest(self.tokenizer)), self.targets)

    @classmethod
    def load(cls, run: RunDir, domain: str, split: str, *, tokens: int, sequence_length: int) -> EvaluationText:
        """Load at most `tokens` targets of a domain's split, with its documents in a fixed random order.

        Raises DataError if the domain is not prepared, was prepared with another tokenizer, or is damaged.
        """
        # Imported late: Megatron-core takes seconds, and evaluating scores may need no text.
        import_uncompiled("megatron.core")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        tokenizer = directory_digest(run.tokenizer)
        fingerprint = Fingerprint.of_domain(run, domain)
        fingerprint.require_tokenizer(tokenizer, run)
        fingerprint.require_whole(run)
        text = _sample(IndexedDataset(str(run.tokens(domain, split))), tokens + 1)
        starts = np.arange(0, len(text) - 1, sequence_length, dtype=np.int64)
        digest = hashlib.sha256(json.dumps([domain, split, sequence_length, tokenizer]).encode())
        digest.update(text.astype("<i8").tobytes())
        return cls(domain, split, text, starts, digest.hexdigest(), run.tokenizer)


def _sample(documents: IndexedDataset, tokens: int) -> Array:
    # NumPy guarantees RandomState's stream; another order would be another test set.
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
    """Load a tokenizer once for all texts of a run; `digest` is part of the cache key."""
    return Tokenizer.load(directory)


def _text_bytes(tokenizer: Tokenizer, ids: Array) -> int:
    """Decode document by document, because a decoder may treat the start of a text differently."""
    ends = np.flatnonzero(ids == tokenizer.eos)
    text = ids != tokenizer.eos
    if tokenizer.begins_with_bos:
        text &= ids != tokenizer.bos
    return sum(
        len(tokenizer.decode(document[is_text].tolist()).encode())
        for document, is_text in zip(np.split(ids, ends), np.split(text, ends), strict=True)
    )
