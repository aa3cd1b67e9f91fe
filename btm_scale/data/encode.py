"""Tokenize documents in worker processes; ids are returned in the order of the documents."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from btm_scale.data.chat.encode import ChatEncoding, encode_chats, end_rendering, joined
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.tokenizer_trial import trials_passed, trust_trials
from btm_scale.util.pools import lost_workers_told, process_pool

Tag = TypeVar("Tag")
Text = str | np.ndarray[Any, Any]  # a document, or its ids from token files

# Enough text that sending it to a worker costs little compared with encoding it.
_BATCH_CHARACTERS = 1 << 18
# Longer texts are encoded in pieces that end with a line: no token of a trained tokenizer spans a newline.
_PIECE_CHARACTERS = 1 << 20

_tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Ids:
    """The concatenated ids of consecutive documents, and how many each has.

    Of conversations also the mask, uint8 [ids], and why some have no ids, by their number.
    """

    ids: np.ndarray[Any, Any]
    lengths: list[int]
    mask: np.ndarray[Any, Any] | None = None
    problems: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded(Generic[Tag]):
    """Consecutive documents as tokens, with the tags that they were given with."""

    tags: list[Tag]
    tokens: Ids


def _start_worker(directory: Path, passed: frozenset[str]) -> None:
    global _tokenizer
    trust_trials(passed)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.load(directory)


def _encode_in_worker(texts: list[Text], chats: ChatEncoding | None) -> Ids:
    assert _tokenizer is not None
    return _encode(_tokenizer, texts, chats)


def _encode(tokenizer: Tokenizer, texts: Sequence[Text], chats: ChatEncoding | None) -> Ids:
    """Return the ids of all texts, each followed by eos.

    Each text begins with BOS if the run's documents do. The ids of a text from token files are kept.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    if chats is not None:
        ids, mask, lengths, problems = joined(encode_chats(chats, tokenizer, [str(text) for text in texts]))
        return Ids(ids.astype(dtype), lengths, mask, problems)
    begin = np.array([tokenizer.start] if tokenizer.begins_with_bos else [], dtype=dtype)
    end = np.array([tokenizer.eos], dtype=dtype)
    pieces = [list(_pieces(text)) if isinstance(text, str) else [text] for text in texts]
    to_encode = [piece for document in pieces for piece in document if isinstance(piece, str)]
    encoded = iter(tokenizer.encode_batch(to_encode) if to_encode else ())
    parts: list[np.ndarray[Any, Any]] = []
    lengths = []
    for document in pieces:
        own = [(next(encoded) if isinstance(piece, str) else piece).astype(dtype) for piece in document]
        parts += [begin, *own, end]
        lengths.append(len(begin) + sum(map(len, own)) + 1)
    return Ids(np.concatenate(parts), lengths)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        if end <= start:
            end = start + _PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


def token_dtype(vocab_size: int) -> type[np.generic]:
    """Return the smallest dtype of Megatron-core's indexed datasets that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


class Encoder:
    """A pool of processes that share a tokenizer; the result does not depend on their number."""

    def __init__(self, tokenizer_directory: Path, workers: int) -> None:
        self.tokenizer = Tokenizer.load(tokenizer_directory)
        self._directory = tokenizer_directory
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Encoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        end_rendering()

    def encode(self, texts: Iterable[tuple[Text, Tag]], chats: ChatEncoding | None = None) -> Iterator[Encoded[Tag]]:
        """Yield batches of consecutive documents, which are conversations with `chats`.

        A bounded number of texts is in memory at a time, however long the stream.
        """
        waiting: deque[tuple[list[Tag], Future[Ids]]] = deque()
        for batch in _batches(texts):
            documents, tags = [text for text, _ in batch], [tag for _, tag in batch]
            if self._workers == 1:
                yield Encoded(tags, _encode(self.tokenizer, documents, chats))
                continue
            waiting.append((tags, self._start().submit(_encode_in_worker, documents, chats)))
            if len(waiting) > 2 * self._workers:
                tags, result = waiting.popleft()
                yield Encoded(tags, _encoded(result))
        for tags, result in waiting:
            yield Encoded(tags, _encoded(result))

    def _start(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = process_pool(
                self._workers, forks=False, initializer=_start_worker, initargs=(self._directory, trials_passed())
            )
        return self._pool


def _encoded(result: Future[Ids]) -> Ids:
    with lost_workers_told():
        return result.result()


def _batches(texts: Iterable[tuple[Text, Tag]]) -> Iterator[list[tuple[Text, Tag]]]:
    batch: list[tuple[Text, Tag]] = []
    size = 0
    for text, tag in texts:
        batch.append((text, tag))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
