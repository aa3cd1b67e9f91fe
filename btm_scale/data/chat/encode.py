"""Encode conversations: their ids, and a mask of those that are trained on."""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from btm_scale.data.chat.answers import Rendering
from btm_scale.data.chat.process import ChatProcess, TooExpensive
from btm_scale.data.chat.rows import turns_of
from btm_scale.data.chat.template import template_of
from btm_scale.data.sources import DomainSource
from btm_scale.data.tokenizer import Tokenizer, TransformersTokenizer
from btm_scale.data.tokenizer_files import HUGGING_FACE_FILE, SENTENCEPIECE_FILE
from btm_scale.errors import DataError

# Bits of a mask.
TRAINED = 1  # part of an answer
TURN = 2  # the first token after an answer, where a long conversation may be cut

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ChatEncoding:
    """How a domain's conversations become tokens. It can be sent to other processes."""

    template: str
    special: str  # JSON
    loss: Literal["all", "last"]
    tokenizer: Path

    @classmethod
    def of(cls, source: DomainSource, tokenizer: Path) -> ChatEncoding:
        """Return the encoding of a domain. Raises DataError if there is no chat template."""
        template = template_of(source, tokenizer)
        return cls(template.template, json.dumps(template.special), source.settings.loss, tokenizer)


@dataclass(frozen=True)
class EncodedChat:
    """The ids and mask of a conversation, int [tokens] and uint8 [tokens]; none if there is a `problem`."""

    ids: Array
    mask: Array
    problem: str = ""


def encode_chats(encoding: ChatEncoding, tokenizer: Tokenizer, texts: Sequence[str]) -> list[EncodedChat]:
    """Encode conversations; one whose answers cannot be determined has a problem instead.

    Raises DataError if the template exceeds a limit whatever the conversation.
    """
    try:
        renderings = _process(encoding.template, encoding.special).find_answers([turns_of(text) for text in texts])
    except TooExpensive as error:
        raise DataError(
            f"The chat template cannot render conversations: {error} for each of several. Use another template."
        ) from None
    reader = reader_of(encoding.tokenizer)
    return [
        EncodedChat(*_NOTHING, f"the chat template refuses it: {one}")
        if isinstance(one, str)
        else _encoded(one, encoding, tokenizer, reader)
        for one in renderings
    ]


def end_rendering() -> None:
    """End the processes that render."""
    _process.cache_clear()


def is_special_token(tokenizer: Tokenizer, token: int) -> bool:
    """Return whether a token is special, such as an end of turn: it has no text, or one that has other ids as text."""
    text = tokenizer.decode([token])
    return not text or tokenizer.encode_special(text) == [token] != tokenizer.encode(text)


_NOTHING = np.empty(0, np.int32), np.empty(0, np.uint8)


@functools.lru_cache(maxsize=4)
def _process(template: str, special: str) -> ChatProcess:
    return ChatProcess(template, json.loads(special))


@functools.lru_cache(maxsize=2)
def reader_of(directory: Path) -> Tokenizer:
    """Return the tokenizer in the form that knows special tokens in text: sentencepiece alone does not."""
    if (directory / HUGGING_FACE_FILE).is_file():
        return TransformersTokenizer.of(directory)
    return Tokenizer.load(directory)


def _encoded(rendering: Rendering, encoding: ChatEncoding, tokenizer: Tokenizer, reader: Tokenizer) -> EncodedChat:
    answers = rendering.answers
    ids, ranges, following = _by_offsets(reader, rendering) or _by_parts(reader, rendering)
    if len(ids) and ids.max() >= tokenizer.vocab_size:
        raise DataError(
            f"{encoding.tokenizer / HUGGING_FACE_FILE} adds a token with the id {ids.max()} to {SENTENCEPIECE_FILE}, "
            "and no other file lists it. A tokenizer lists its added tokens in added_tokens.json or "
            "tokenizer_config.json too: copy these files of it as well."
        )
    for (begin, end), (first, last) in zip(answers, ranges, strict=True):
        if not _is_same(reader.decode(ids[first:last].tolist()), rendering.text[begin:end]):
            return EncodedChat(
                *_NOTHING, "the tokenizer cannot separate its answers from the rest: no tokens decode to their text"
            )
    if not (ranges := [(first, last) for first, last in ranges if first < last]):
        return EncodedChat(*_NOTHING, "its answers have no tokens")
    mask = np.zeros(len(ids), np.uint8)
    for first, last in ranges if encoding.loss == "all" else ranges[-1:]:
        mask[first:last] |= TRAINED
    rest = rendering.text[answers[-1][1] :]
    mask[[token for token in (following if rest.strip() else following[:-1]) if token < len(ids)]] |= TURN
    last_answer = int(ids[ranges[-1][1] - 1])
    if ids[0] != tokenizer.start:  # with which a prompt begins too
        ids, mask = np.insert(ids, 0, tokenizer.start), np.insert(mask, 0, 0)
    if ids[-1] != tokenizer.eos:
        # Without a token that ends turns, the end of the conversation is what stops the model.
        stops = not rest.strip() and not is_special_token(reader, last_answer)
        ids, mask = np.append(ids, tokenizer.eos), np.append(mask, TRAINED if stops else 0)
    return EncodedChat(ids.astype(np.int32), mask.astype(np.uint8))


Found = tuple[Array, list[tuple[int, int]], list[int]]  # ids; tokens of each answer; the first token of what follows


def _by_offsets(reader: Tokenizer, rendering: Rendering) -> Found | None:
    """Encode the complete text; None if a token belongs to an answer and to the text around it."""
    if not isinstance(reader, TransformersTokenizer):
        return None
    try:
        encoded = reader.special_encoding([rendering.text], return_offsets_mapping=True)
    except DataError as error:
        if isinstance(error.__cause__, NotImplementedError):  # a tokenizer in Python has no offsets
            return None
        raise
    ids = np.array(encoded["input_ids"][0], np.int32)
    offsets = np.array(encoded["offset_mapping"][0], np.int64).reshape(-1, 2)
    begins, ends = offsets[:, 0], offsets[:, 1]
    ranges, following = [], []
    for begin, end in rendering.answers:
        first, last = int(np.searchsorted(ends, begin, "right")), int(np.searchsorted(begins, end, "left"))
        if first >= last or begins[first] < begin or ends[last - 1] > end:
            return None
        ranges.append((first, last))
        after = last
        while after < len(ids) and rendering.text[begins[after] : ends[after]].isspace():
            after += 1
        following.append(after)
    return ids, ranges, following


def _by_parts(reader: Tokenizer, rendering: Rendering) -> Found:
    """Encode answers and the text around them one by one, so that no token belongs to both."""
    parts: list[Array] = []
    ranges, position, tokens = [], 0, 0
    for begin, end in rendering.answers:
        around, answer = (_special(reader, rendering.text[a:b]) for a, b in ((position, begin), (begin, end)))
        parts += [around, answer]
        ranges.append((tokens + len(around), tokens + len(around) + len(answer)))
        tokens += len(around) + len(answer)
        position = end
    parts.append(_special(reader, rendering.text[position:]))
    return np.concatenate(parts), ranges, [last for _, last in ranges]


def _special(reader: Tokenizer, text: str) -> Array:
    return np.array(reader.encode_special(text) if text else [], np.int32)


def _is_same(decoded: str, text: str) -> bool:
    """Compare texts under Unicode's canonical form, without the spaces before them, which decoders drop."""
    one, other = (unicodedata.normalize("NFC", value).lstrip(" ") for value in (decoded, text))
    return one == other


def joined(chats: Iterable[EncodedChat]) -> tuple[Array, Array, list[int], dict[int, str]]:
    """Return the concatenated ids and mask, the number of ids of each chat, and the problems by its number."""
    chats = list(chats)
    ids = np.concatenate([chat.ids for chat in chats])
    problems = {number: chat.problem for number, chat in enumerate(chats) if chat.problem}
    return ids, np.concatenate([chat.mask for chat in chats]), [len(chat.ids) for chat in chats], problems
