"""The evaluation text of a domain: every method is evaluated on the same tokens in the same order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.data.chat.encode import TRAINED, is_special_token, reader_of
from btm_scale.data.chat.packing import flagged, packed, pieces_of, sequence_of
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.token_index import TokenSequences
from btm_scale.data.tokenizer import Tokenizer, directory_digest
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class EvaluationText:
    """Concatenated documents of a split, cut into blocks that are predicted independently.

    Block b has the inputs `tokens[start : end]` and the targets `tokens[start + 1 : end + 1]`, where start is
    `block_starts[b]` and end the next block's start; the last block may be shorter.

    Of conversations, each is a block, or several if it is longer than a sequence, and only answers count.
    """

    domain: str
    split: str
    tokens: Array
    """int64 [targets + 1]"""
    block_starts: Array
    """int64 [blocks]: 0, sequence_length, 2 x sequence_length, ...; of conversations, their first tokens."""
    fingerprint: str
    """Hex digest of the tokens and the block starts."""
    tokenizer: Path
    """The directory of the tokenizer that made the tokens."""
    counted: Array | None = None
    """Of conversations: the targets that are parts of answers, bool [targets]. None if every target counts."""

    @property
    def targets(self) -> Array:
        """The tokens that are predicted, int64 [targets]."""
        return self.tokens[1:]

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of the targets that count, without the tokens around documents and turns."""
        if self.counted is not None:
            return _answer_bytes(reader_of(self.tokenizer), self.targets, self.counted)
        return _text_bytes(self._loaded, self.targets)

    @property
    def _loaded(self) -> Tokenizer:
        return _tokenizer(self.tokenizer, directory_digest(self.tokenizer))

    def of_targets(self, log_probs: Array) -> Array:
        """Return those of the log-probabilities [targets] that count."""
        return log_probs if self.counted is None else log_probs[self.counted]

    def sequences(self, length: int) -> Array:
        """Return conversations as flagged training sequences, int64 [sequences, length + 1]."""
        assert self.counted is not None
        mask = np.concatenate([[False], self.counted]).astype(np.uint8)
        bounds = [*self.block_starts.tolist(), len(self.tokens)]
        pieces = [(begin, min(end, begin + length)) for begin, end in pairwise(bounds)]
        pieces = [(begin, end) for begin, end in pieces if mask[begin + 1 : end].any()]
        end_of_text = self._loaded.eos
        parts = [flagged(self.tokens[begin:end], mask[begin:end]) for begin, end in pieces]
        rows = packed([len(part) for part in parts], length)
        return np.stack([sequence_of([parts[number] for number in row], length, end_of_text) for row in rows])

    @classmethod
    def load(cls, run: RunDir, domain: str, split: str, *, tokens: int, sequence_length: int) -> EvaluationText:
        """Load at most `tokens` targets of a domain's split, with its documents in a fixed random order.

        Raises DataError if the domain is not prepared, was prepared with another tokenizer, or is damaged.
        """
        tokenizer = directory_digest(run.tokenizer)
        fingerprint = Fingerprint.of_domain(run, domain)
        fingerprint.require_tokenizer(tokenizer, run)
        fingerprint.require_whole(run)
        documents = TokenSequences(run.tokens(domain, split))
        text, chosen = _sample(documents, tokens + 1)
        digest = hashlib.sha256(json.dumps([domain, split, sequence_length, tokenizer]).encode())
        digest.update(text.astype("<i8").tobytes())
        counted = None
        if fingerprint.has_chats:
            starts, counted = _answers(documents.lengths, chosen, run.mask(domain, split), sequence_length)
            starts, counted = starts[starts < len(text) - 1], counted[: len(text) - 1]
            digest.update(starts.tobytes() + counted.tobytes())
            if not counted.any():
                raise DataError(
                    f"The first {tokens:,} tokens of the {split} split of domain '{domain}' have no answer to score. "
                    "Raise evaluate.tokens_per_domain, evaluate.dev_blocks and dev_loss.tokens, or add conversations."
                )
        else:
            starts = np.arange(0, len(text) - 1, sequence_length, dtype=np.int64)
        return cls(domain, split, text, starts, digest.hexdigest(), run.tokenizer, counted)


def _sample(documents: TokenSequences, tokens: int) -> tuple[Array, list[int]]:
    """Return the first tokens of documents in a fixed random order, and the documents."""
    # NumPy guarantees RandomState's stream; another order would be another test set.
    parts: list[Array] = []
    chosen: list[int] = []
    for document in np.random.RandomState(0).permutation(len(documents)):
        chosen.append(int(document))
        parts.append(documents[chosen[-1]].astype(np.int64))
        tokens -= len(parts[-1])
        if tokens <= 0:
            break
    text = np.concatenate(parts)
    return text[: len(text) + min(tokens, 0)], chosen


def _answers(lengths: Array, chosen: list[int], path: Path, length: int) -> tuple[Array, Array]:
    """Return the first token of each part of the chosen conversations, and which targets are parts of answers."""
    mask = np.memmap(path, np.uint8, "r")
    begins = np.cumsum(lengths) - lengths
    starts: list[int] = []
    trained: list[Array] = []
    position = 0
    for document in chosen:
        begin, size = int(begins[document]), int(lengths[document])
        starts += [position + first - begin for first, _ in pieces_of(begin, begin + size, mask, length)]
        trained.append((mask[begin : begin + size] & TRAINED).astype(bool))
        position += size
    counted = np.concatenate(trained)
    counted[starts] = False  # the first token of a block is not predicted
    return np.array(starts, np.int64), counted[1:]


@lru_cache(maxsize=1)
def _tokenizer(directory: Path, digest: str) -> Tokenizer:
    """Load a tokenizer once for all texts of a run; `digest` is part of the cache key."""
    return Tokenizer.load(directory)


def _answer_bytes(tokenizer: Tokenizer, ids: Array, counted: Array) -> int:
    """Decode answer by answer, each without the token that ends its turn."""
    bounds = np.flatnonzero(np.diff(np.concatenate([[False], counted, [False]])))
    total = 0
    for begin, end in bounds.reshape(-1, 2).tolist():
        answer = ids[begin:end].tolist()
        if answer[-1] == tokenizer.eos or is_special_token(tokenizer, answer[-1]):
            answer.pop()
        total += len(tokenizer.decode(answer).encode()) if answer else 0
    return max(1, total)


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
