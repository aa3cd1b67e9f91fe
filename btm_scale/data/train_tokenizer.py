"""Train a run's tokenizer on a balanced sample of its domains."""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from btm_scale.config.data import DataConfig
from btm_scale.data.chat.rows import spoken
from btm_scale.data.documents import BadLines, Document, empty_domain, expected_bytes, read_documents, read_file_of
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.compression import NotCompressedError
from btm_scale.data.formats.sense import format_of, holds_rows
from btm_scale.data.sources import DomainSource
from btm_scale.data.splits import ByHash, Placement
from btm_scale.data.tokenizer import first_line
from btm_scale.data.tokenizer_files import SENTENCEPIECE_FILE
from btm_scale.errors import DataError

logger = logging.getLogger(__name__)

_SPACE = "\u2581"
_COVERAGE = 0.9995  # sentencepiece's default
_LOWEST_COVERAGE = 0.98  # that sentencepiece accepts
_FIXED_TOKENS = 256 + 3 + 1  # bytes, control tokens and the newline
_FEWEST_TOKENS = 320  # that a config may ask for
_LINE_CHARACTERS = 16_000
# A long document at the beginning can be the complete sample.
_MORE = "add text, raise tokenizer.sample_bytes if there is more"


def train_tokenizer(directory: Path, texts: Iterable[str], *, vocab_size: int) -> None:
    """Train a sentencepiece BPE tokenizer and write it as a Hugging Face directory.

    Every text can be encoded (unknown characters as bytes) and is decoded exactly: nothing is normalised, and a newline
    is a separate token. If the texts have more characters than fit, they are read again. Raises DataError if they are
    too short for `vocab_size` tokens, or if their most frequent characters need more.
    """
    try:
        model = _trained(texts, vocab_size)
    except _TooManyCharactersError as error:
        if iter(texts) is texts:  # they can be read only once
            raise _vocabulary_too_small(vocab_size, error.tokens, _COVERAGE) from None
        model = _trained_with_rare_characters(texts, vocab_size)
    (directory / SENTENCEPIECE_FILE).write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    _fast_tokenizer(processor).save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


class _TooManyCharactersError(Exception):
    """A vocabulary that is smaller than the alphabet, which needs at least `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens


def _vocabulary_too_small(vocab_size: int, needed: int, coverage: float) -> DataError:
    return DataError(
        f"A tokenizer of {vocab_size:,} tokens is too small for the different characters of the text. The characters "
        f"of {100 * coverage:g}% of the text must be tokens; only the rarest are encoded as bytes. Set "
        f"tokenizer.vocab_size to at least {needed}, or tokenizer.path to an existing tokenizer."
    )


def _trained_with_rare_characters(texts: Iterable[str], vocab_size: int) -> bytes:
    """Return a sentencepiece model that encodes as many characters as bytes as its vocabulary requires."""
    counts: Counter[str] = Counter()
    for line in _training_lines(texts):
        counts.update(line)
    kept = counts.most_common((vocab_size - _FIXED_TOKENS) // 2)  # the other half of the tokens are merges
    coverage = max(_LOWEST_COVERAGE, sum(count for _, count in kept) / counts.total())
    try:
        model = _trained(texts, vocab_size, coverage)
    except _TooManyCharactersError as error:
        raise _vocabulary_too_small(vocab_size, error.tokens, coverage) from None
    logger.warning(
        "The text has %s different characters: with %s tokens the rarest are encoded as bytes. A larger "
        "tokenizer.vocab_size encodes this text in fewer tokens.",
        f"{len(counts):,}",
        f"{vocab_size:,}",
    )
    return model


def _trained(texts: Iterable[str], vocab_size: int, coverage: float = _COVERAGE) -> bytes:
    """Return a sentencepiece model; characters beyond the `coverage` of the text are encoded as bytes."""
    model = io.BytesIO()
    lines = _Lines(texts)
    # The model file records the options that were set: the default, set, would change the tokenizer's digest. So would
    # num_threads, which changes neither pieces nor time: sentencepiece learns BPE merges in one thread.
    explicit: dict[str, Any] = {} if coverage == _COVERAGE else {"character_coverage": coverage}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            **explicit,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            max_sentence_length=8 * _LINE_CHARACTERS,
            minloglevel=3,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        if alphabet := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise _TooManyCharactersError(int(alphabet[1])) from None
        raise _cannot_train(vocab_size, str(error)) from None
    return model.getvalue()


def _cannot_train(vocab_size: int, reason: str) -> DataError:
    """Return the error for a text that has too few pieces, whose number is in sentencepiece's reason."""
    fact, remedy = first_line(ValueError(reason)), f"Lower tokenizer.vocab_size, {_MORE}"
    if most := re.search(r"Please set it to a value <= (\d+)", reason):
        fact = f"it has pieces for at most {int(most[1]):,}"
        is_allowed = int(most[1]) >= _FEWEST_TOKENS
        remedy = f"Set tokenizer.vocab_size to at most {most[1]}, {_MORE}" if is_allowed else _MORE.capitalize()
    elif "sentences_.empty()" in reason:
        fact, remedy = "it has no line with a character", _MORE.capitalize()
    return DataError(
        f"Cannot train a tokenizer of {vocab_size} tokens on this text: {fact}. {remedy}, or set tokenizer.path to an "
        "existing tokenizer."
    )


class _Lines:
    """Iterates once over the lines of texts; `error` keeps an exception that sentencepiece turns into RuntimeError."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from _training_lines(self._texts)
        except GeneratorExit:
            raise
        except BaseException as error:  # such as the SystemExit of a requested stop
            self.error = error
            raise


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    # A newline never merges with another character, so lines are enough to learn merges from.
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE_CHARACTERS):
                piece = line[start : start + _LINE_CHARACTERS]
                if "\0" not in piece:
                    yield piece


def _fast_tokenizer(model: Any) -> FastTokenizer:
    """Return the same BPE for the `tokenizers` library: pairs of pieces that form a piece are merges, best first."""
    pieces = [model.id_to_piece(token) for token in range(model.get_piece_size())]
    ids = {piece: token for token, piece in enumerate(pieces)}
    learned = [
        token
        for token in range(len(pieces))
        if not (model.is_control(token) or model.is_unknown(token) or model.is_byte(token))
    ]
    merges = sorted(
        (-model.get_score(token), ids[pieces[token][:cut]], ids[pieces[token][cut:]])
        for token in learned
        for cut in range(1, len(pieces[token]))
        if pieces[token][:cut] in ids and pieces[token][cut:] in ids
    )
    bpe = BPE(
        vocab=ids,
        merges=[(pieces[left], pieces[right]) for _, left, right in merges],
        unk_token=pieces[model.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = FastTokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = (model.unk_id(), model.bos_id(), model.eos_id())
    tokenizer.add_special_tokens([AddedToken(pieces[token], normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken("\n", normalized=False, special=False)])
    return tokenizer


def balanced_sample(
    sources: Sequence[DomainSource],
    sample_bytes: int,
    data: DataConfig,
    placement_of: Callable[[DomainSource], Placement] | None = None,
) -> Iterator[str]:
    """Yield about `sample_bytes` of training text, the same amount from every domain.

    `placement_of` returns how a domain is split; by default, by the usual hash ranges. Raises DataError if a domain is
    empty.
    """
    for source in sources:
        usual = ByHash(data.test, data.test + data.dev)
        placement = placement_of(source) if placement_of is not None else usual
        yield from _domain_sample(source, sample_bytes / len(sources), data, placement)


def _domain_sample(source: DomainSource, sample_bytes: float, data: DataConfig, placement: Placement) -> Iterator[str]:
    """Yield about `sample_bytes` of a domain's training text, spread over its files in proportion to their sizes."""
    bad_lines = BadLines(data.on_bad_line)
    if placement.name == "position" or source.settings.max_bytes is not None:
        yield from _first_training_text(source, sample_bytes, bad_lines, placement)
        return
    sizes = [expected_bytes(file) for file in source.files]
    unread = sum(sizes)
    documents = 0
    for file, size in zip(source.files, sizes, strict=True):
        allowance = sample_bytes * size / unread
        unread -= size
        # Keeping a fraction spreads the sample over the file; at least a tenth is kept, to limit how much is read.
        keep = 2.0**64 * (max(0.1, 2 * allowance / size) if _has_rows(file, source) else 1.0)
        taken = 0
        for document, identity in placement.placed(read_file_of(source, file, bad_lines)):
            documents += 1
            if identity.split == "train" and identity.key < keep:
                text = _spoken(document, source)[: int(allowance - taken) + 1]
                taken += len(text.encode())
                yield text
                if taken >= allowance:
                    break
        sample_bytes -= taken
    if not documents:
        raise empty_domain(source, bad_lines)


def _spoken(document: Document, source: DomainSource) -> str:
    return document.text if source.settings.chat is None else spoken(document.text)


def _has_rows(file: SourceFile, source: DomainSource) -> bool:
    try:
        return holds_rows(format_of(file, source.settings))
    except NotCompressedError:  # reported when it is read
        return False


def _first_training_text(
    source: DomainSource, sample_bytes: float, bad_lines: BadLines, placement: Placement
) -> Iterator[str]:
    documents = 0
    for document, identity in placement.placed(read_documents(source, bad_lines)):
        documents += 1
        if identity.split == "train":
            text = _spoken(document, source)[: int(sample_bytes) + 1]
            sample_bytes -= len(text.encode())
            yield text
            if sample_bytes <= 0:
                return
    if not documents:
        raise empty_domain(source, bad_lines)
