"""The tokenizer of a run: one interface to sentencepiece models and Hugging Face tokenizers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import sentencepiece

from btm_scale.data.tokenizer_files import (
    DOCUMENT_START,
    HUGGING_FACE_FILE,
    IDENTITY_FILES,
    SENTENCEPIECE_FILE,
    TEKKEN_FILE,
    Kind,
    added_ids,
    kind_of,
    main_file,
    require_contents,
)
from btm_scale.data.tokenizer_trial import NotUsable, require_usable
from btm_scale.errors import DataError, UserError
from btm_scale.model.hf_load import import_transformers, load_tekken, load_tokenizer, require_own_files
from btm_scale.util.disk_errors import is_transient
from btm_scale.util.inside import file_inside
from btm_scale.util.records import read_object
from btm_scale.util.time_limit import within

T = TypeVar("T")

# More rows than the embedding of any model.
_MOST_IDS = 1 << 24
# On shorter texts, the limits of the regular expression library end a search soon enough.
_SHORT_TEXT = 512
_SECONDS = 60.0
_CHARACTERS_PER_SECOND = 10_000


class Tokenizer(ABC):
    """Encodes text without adding special tokens, and decodes it: `decode(encode(text)) == text`.

    The one exception: sentencepiece represents a space as U+2581, so this character is decoded to a space.
    """

    digest: str
    vocab_size: int
    """The rows that a model's embedding needs: the largest id + 1."""
    eos: int
    bos: int | None = None
    """The BOS token, if the tokenizer has one."""
    begins_with_bos: bool = False
    """Whether each document of the run begins with it."""

    @property
    def start(self) -> int:
        """The token before the text of a document: BOS, or the end of the document before it."""
        return self.bos if self.begins_with_bos and self.bos is not None else self.eos

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Load the tokenizer in a directory. Raises DataError if it is missing, cannot be loaded, or cannot encode."""
        _require(directory)
        return _CLASSES[kind_of(directory)].of(directory)

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Load a tokenizer of this kind, once a child process has tried it. Raises DataError."""
        remedy = (
            f"Give a directory with {SENTENCEPIECE_FILE} (sentencepiece) or one that transformers.AutoTokenizer loads."
        )
        try:
            cls._before_loading(directory)
            require_usable(directory, cls.__name__, cls, IDENTITY_FILES)
            return cls(directory)
        except UserError as error:
            raise DataError(str(error)) from None
        except NotUsable as error:
            file = main_file(directory)
            shown = f"{directory} ({file})" if file else str(directory)
            raise DataError(f"The tokenizer in {shown} {error}. {remedy}") from None
        except Exception as error:  # a damaged file can end in any error of transformers, tokenizers or sentencepiece
            if isinstance(error, OSError) and is_transient(error):
                raise
            raise DataError(f"The tokenizer in {directory} cannot be loaded: {first_line(error)}. {remedy}") from None

    @staticmethod
    def _before_loading(directory: Path) -> None:
        """Refuse links out of the directory, and import what a child process needs too."""
        file_inside(directory, SENTENCEPIECE_FILE)

    def __init__(self, directory: Path = Path()) -> None:
        self.directory = directory  # for messages

    def adds_bos(self) -> bool:
        """Return whether the tokenizer itself puts BOS before a text, unless it is asked not to."""
        return False

    def _set_special(self, eos: int | None, bos: int | None) -> None:
        """Set the special tokens. Raises ValueError if one is missing that documents need."""
        if eos is None:
            raise ValueError("it has no eos_token, which ends every document")
        self.eos, self.bos = eos, bos
        self.begins_with_bos = (self.directory / DOCUMENT_START).is_file()
        if self.begins_with_bos and bos is None:
            raise ValueError(f"it has no bos_token, with which every document begins ({DOCUMENT_START})")

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

    def encode_special(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are special, as in a rendered chat."""
        return self.encode(text)

    @contextmanager
    def _failures(self, what: str, items: Sequence[Any]) -> Iterator[None]:
        """Raise DataError, with the file and the text, for whatever stops the tokenizer's library.

        Its cause is the library's error, if that was not a panic.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, UserError):
            raise
        except TimeoutError:
            raise self._failed(what, items, "it takes too long") from None
        except BaseException as error:  # a panic in Rust is not an Exception
            if what == "encode" and len(items) > 1:
                for item in items:
                    self.encode_batch([item])  # raises for the text at fault
            raise self._failed(what, items, first_line(error)) from (error if isinstance(error, Exception) else None)

    def _failed(self, what: str, items: Sequence[Any], reason: str) -> DataError:
        begin = f"the text that begins with {items[0][:60]!r}" if what == "encode" and items else "the ids of a text"
        return DataError(
            f"{self.directory / main_file(self.directory)} cannot {what} {begin}: {reason}. Choose another tokenizer."
        )


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, loaded by the sentencepiece library."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(directory / SENTENCEPIECE_FILE))
        self.digest = directory_digest(directory)
        self.vocab_size = _rows(max(self._model.get_piece_size() - 1, *added_ids(directory), 0))
        eos, bos = self._model.eos_id(), self._model.bos_id()
        self._set_special(eos if eos >= 0 else None, bos if bos >= 0 else None)

    def adds_bos(self) -> bool:
        """See Tokenizer: what tokenizer_config.json says."""
        path = file_inside(self.directory, "tokenizer_config.json")
        return path.is_file() and read_object(path, DataError).get("add_bos_token") is True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """See Tokenizer."""
        with self._failures("encode", texts):
            ids: list[np.ndarray[Any, Any]] = self._model.encode(list(texts), num_threads=1, return_type="numpy")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        tokens, pieces = [int(token) for token in ids], self._model.get_piece_size()
        if any(token >= pieces for token in tokens) and self._published is not None:
            # The model writes nothing for its control tokens.
            shown = [token for token in tokens if token >= pieces or not self._model.is_control(token)]
            return self._published.decode(shown)
        with self._failures("decode", ids):
            text: str = self._model.decode(tokens)
        return text

    def encode_special(self, text: str) -> list[int]:
        """See Tokenizer: the model alone does not know special tokens in text."""
        return self.encode(text) if self._published is None else self._published.encode_special(text)

    @cached_property
    def _published(self) -> TransformersTokenizer | None:
        """The tokenizer.json beside the model, which has the tokens that were added to it."""
        has_json = (self.directory / HUGGING_FACE_FILE).is_file()
        return TransformersTokenizer.of(self.directory) if has_json else None


class TransformersTokenizer(Tokenizer):
    """Any tokenizer that `transformers.AutoTokenizer` loads."""

    @staticmethod
    def _before_loading(directory: Path) -> None:
        require_own_files(directory)
        import_transformers()

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._tokenizer = self._loaded(directory)
        self.digest = directory_digest(directory)
        self.vocab_size = _rows(max(len(self._tokenizer) - 1, *self._tokenizer.get_vocab().values()))
        self._set_special(self._tokenizer.eos_token_id, self._tokenizer.bos_token_id)

    def adds_bos(self) -> bool:
        """See Tokenizer."""
        with self._failures("encode", ["a"]):
            return self.bos is not None and self._tokenizer("a")["input_ids"][:1] == [self.bos]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
        """See Tokenizer."""
        with self._failures("encode", texts):
            encoded = self._in_time(lambda: self._encoded(texts), sum(map(len, texts)))
            arrays = [np.array(ids, dtype=np.int32) for ids in encoded]
        for text, ids in zip(texts, arrays, strict=True):
            if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
                raise self._failed("encode", [text], f"an id is not in its vocabulary of {self.vocab_size:,} tokens")
        return arrays

    def encode_special(self, text: str) -> list[int]:
        """See Tokenizer."""
        ids: list[int] = self.special_encoding([text])["input_ids"][0]
        return ids

    def special_encoding(self, texts: list[str], **options: Any) -> Any:
        """Return the library's encoding of texts in which special tokens are special."""
        options |= {"add_special_tokens": False, "split_special_tokens": False, "verbose": False}
        with self._failures("encode", texts):
            return self._in_time(lambda: self._chats(texts, **options), sum(map(len, texts)))

    @cached_property
    def _chats(self) -> Any:
        # The library sets `split_special_tokens` in its object, which threads that encode chats and text cannot share.
        return self._loaded(self.directory)

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        # Special tokens in text are plain text: a document that quotes "</s>" must not end there.
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        with self._failures("decode", ids):
            return self._in_time(lambda: self._decoded([int(token) for token in ids]), len(ids))

    def _decoded(self, ids: list[int]) -> str:
        if (library := getattr(self._tokenizer, "backend_tokenizer", None)) is not None and len(ids) > _SHORT_TEXT:
            text: str = library.decode_batch([ids], skip_special_tokens=False)[0]  # unlike decode, it frees the GIL
            return text
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _in_time(self, do: Callable[[], T], size: int) -> T:
        if size <= _SHORT_TEXT:
            return do()
        return within(_SECONDS + size / _CHARACTERS_PER_SECOND, do)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of each token."""
        ids: dict[str, int] = self._tokenizer.get_vocab()
        return ids

    def save(self, directory: Path) -> None:
        """Write a directory that AutoTokenizer loads without other files."""
        self._tokenizer.save_pretrained(str(directory))

    @staticmethod
    def _loaded(directory: Path) -> Any:
        return load_tokenizer(directory)


class TekkenTokenizer(TransformersTokenizer):
    """The tokenizer of a tekken.json without Hugging Face files, converted by transformers."""

    @staticmethod
    def _loaded(directory: Path) -> Any:
        return load_tekken(directory / TEKKEN_FILE)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, without the advice that follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


def directory_digest(directory: Path) -> str:
    """Return the SHA-256 of the files that determine a tokenizer's ids, as 64 hex digits.

    Raises DataError if there is no such directory.
    """
    _require(directory)
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        if (directory / name).is_file():
            content = (directory / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def same_ids(one: Path, other: Path) -> bool:
    """Return whether two directories hold one tokenizer: the files that determine ids and are in both are equal."""
    common = [name for name in IDENTITY_FILES if (one / name).is_file() and (other / name).is_file()]
    return bool(common) and all((one / name).read_bytes() == (other / name).read_bytes() for name in common)


def _require(directory: Path) -> None:
    if not directory.is_dir():
        raise DataError(f"There is no tokenizer in {directory}. Prepare the run first, or correct tokenizer.path.")
    require_contents(directory)


def _rows(largest: int) -> int:
    """Return the rows that an embedding needs for ids up to `largest`. Raises ValueError if they are too many."""
    if largest >= _MOST_IDS:
        raise ValueError(f"it has a token with the id {largest}. A model has a row of weights for each id up to that")
    return largest + 1


_CLASSES: dict[Kind, type[Tokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "transformers": TransformersTokenizer,
    "tekken": TekkenTokenizer,
}
# What `Tokenizer.load` may return, by name.
KINDS: dict[str, type[Tokenizer]] = {loaded.__name__: loaded for loaded in _CLASSES.values()}
