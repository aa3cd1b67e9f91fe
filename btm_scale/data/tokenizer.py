"""The tokenizer of a run: one interface to sentencepiece models and Hugging Face tokenizers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from btm_scale.errors import DataError
from btm_scale.model.hf_load import load_tokenizer
from btm_scale.util.bounded_json import shown
from btm_scale.util.records import read_object

SENTENCEPIECE_FILE = "tokenizer.model"
# The files that determine the ids of a text; others in a tokenizer's directory do not affect them.
_IDENTITY_FILES = (
    SENTENCEPIECE_FILE,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
)


class Tokenizer(ABC):
    """Encodes text without adding special tokens, and decodes it: `decode(encode(text)) == text`.

    The one exception: sentencepiece represents a space as U+2581, so this character is decoded to a space.
    """

    digest: str
    vocab_size: int
    """The rows that a model's embedding needs: the largest id + 1."""
    eos: int

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Load the tokenizer in a directory. Raises DataError if it is missing or cannot be loaded."""
        _require(directory)
        try:
            if (directory / SENTENCEPIECE_FILE).is_file():
                return SentencePieceTokenizer(directory)
            return TransformersTokenizer(directory)
        except Exception as error:  # a damaged file can end in any error of transformers, tokenizers or sentencepiece
            raise DataError(
                f"The tokenizer in {directory} cannot be loaded: {first_line(error)}. Give a directory with "
                "tokenizer.model (sentencepiece) or one that transformers.AutoTokenizer loads."
            ) from None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """Return the ids of each text, int arrays [tokens]."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, loaded by the sentencepiece library."""

    def __init__(self, directory: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(directory / SENTENCEPIECE_FILE))
        self.digest = directory_digest(directory)
        self.vocab_size = max(self._model.get_piece_size(), *(added + 1 for added in _added_ids(directory)), 1)
        self.eos = self._model.eos_id()
        if self.eos < 0:
            raise ValueError("it has no end-of-text token")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """See Tokenizer."""
        return [np.array(ids, dtype=np.int32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._model.decode([int(token) for token in ids])
        return text


class TransformersTokenizer(Tokenizer):
    """Any tokenizer that `transformers.AutoTokenizer` loads."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_tokenizer(directory)
        self.digest = directory_digest(directory)
        self.vocab_size = max(len(self._tokenizer), max(self._tokenizer.get_vocab().values()) + 1)
        if self._tokenizer.eos_token_id is None:
            raise ValueError("it has no eos_token, which ends every document")
        self.eos = int(self._tokenizer.eos_token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """See Tokenizer."""
        # Special tokens in text are plain text: a document that quotes "</s>" must not end there.
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(
            [int(token) for token in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def save(self, directory: Path) -> None:
        """Write a directory that AutoTokenizer loads without other files."""
        self._tokenizer.save_pretrained(str(directory))


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, without the advice that follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


def directory_digest(directory: Path) -> str:
    """Return the SHA-256 of the files that determine a tokenizer's ids, as 64 hex digits.

    Raises DataError if there is no such directory.
    """
    _require(directory)
    digest = hashlib.sha256()
    for name in _IDENTITY_FILES:
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def same_ids(one: Path, other: Path) -> bool:
    """Return whether two directories hold one tokenizer: the files that determine ids and are in both are equal."""
    common = [name for name in _IDENTITY_FILES if (one / name).is_file() and (other / name).is_file()]
    return bool(common) and all((one / name).read_bytes() == (other / name).read_bytes() for name in common)


def _require(directory: Path) -> None:
    if not directory.is_dir():
        raise DataError(f"There is no tokenizer in {directory}. Prepare the run first, or correct tokenizer.path.")


def _added_ids(directory: Path) -> list[int]:
    """Return the ids that Hugging Face files add to a sentencepiece vocabulary."""
    ids: list[int] = []
    if (path := directory / "added_tokens.json").is_file():
        ids += (_token_id(path, name, value) for name, value in read_object(path, DataError).items())
    if (path := directory / "tokenizer_config.json").is_file():
        decoder = read_object(path, DataError).get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise DataError(f"{path}: 'added_tokens_decoder' must be an object. Copy the tokenizer again.")
        ids += (_token_id(path, key, int(key) if key.isdecimal() and len(key) < 11 else key) for key in decoder)
    return ids


def _token_id(path: Path, name: str, value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise DataError(
            f"{path}: '{name:.80}' must be the id of a token and is {shown(value)}. Copy the tokenizer again."
        )
    return value
