"""Create a run's tokenizer: train one on a balanced sample of the domains, or copy an existing one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from btm_scale.config.data import DataConfig
from btm_scale.data.documents import BadLines, empty_domain, read_file_of
from btm_scale.data.files import SourceFile
from btm_scale.data.sources import DomainSource
from btm_scale.data.splits import identify
from btm_scale.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer, TransformersTokenizer, first_line
from btm_scale.errors import DataError
from btm_scale.util.inside import as_private_as, copy_inside

_SPACE = "\u2581"
_LINE_CHARACTERS = 16_000
_TOKENIZER_FILES = (
    SENTENCEPIECE_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PROBES = (
    "def f(x):\n\treturn  x ** 2  # 1234\n",
    r"Let $\mathcal{O}_X$ be \emph{coherent}; see 3.14.",
    " Naïve café, 北京, 🎉 and an ellipsis … at the end \n\n",
)


def train_tokenizer(directory: Path, texts: Iterable[str], *, vocab_size: int) -> None:
    """Train a sentencepiece BPE tokenizer and write it as a Hugging Face directory.

    Every text can be encoded (unknown characters as bytes) and is decoded exactly: nothing is normalised, and a newline
    is a separate token. Raises DataError if the texts are too short for `vocab_size` tokens.
    """
    model = io.BytesIO()
    lines = _Lines(texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
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
        raise DataError(
            f"Cannot train a tokenizer of {vocab_size} tokens on this text ({first_line(error)}). "
            "Lower tokenizer.vocab_size, add text, or set tokenizer.path to an existing tokenizer."
        ) from None
    (directory / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
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


class _Lines:
    """Iterates once over the lines of texts; `error` keeps an exception that sentencepiece turns into RuntimeError."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from _training_lines(self._texts)
        except DataError as error:
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


def adopt_tokenizer(directory: Path, source: Path) -> None:
    """Copy an existing tokenizer. Raises DataError if sentencepiece or transformers cannot load it."""
    own = Tokenizer.load(source)
    reference = own if isinstance(own, TransformersTokenizer) else _published_form(source)
    if own is not reference and all(own.encode(probe) == reference.encode(probe) for probe in _PROBES):
        for name in _TOKENIZER_FILES:
            if (source / name).is_file():
                copy_inside(source, name, directory)
        return
    # Saved anew, because what AutoTokenizer loads may depend on the config.json of a model.
    try:
        reference.save(directory)
    except ValueError as error:  # the name of a chat template may lead out of the directory
        raise DataError(
            f"The tokenizer in {source} cannot be copied: {first_line(error)}. Correct its files."
        ) from None
    as_private_as([source], directory)


def _published_form(source: Path) -> TransformersTokenizer:
    try:
        return TransformersTokenizer.of(source)
    except DataError as error:
        raise DataError(
            f"{error} Experts are published with a tokenizer of that form: add tokenizer.json and its config."
        ) from None


def balanced_sample(sources: Sequence[DomainSource], sample_bytes: int, data: DataConfig) -> Iterator[str]:
    """Yield about `sample_bytes` of training text, the same amount from every domain.

    Raises DataError if a domain is empty.
    """
    for source in sources:
        yield from _domain_sample(source, sample_bytes / len(sources), data)


def _domain_sample(source: DomainSource, sample_bytes: float, data: DataConfig) -> Iterator[str]:
    """Yield about `sample_bytes` of a domain's training text, spread over its files in proportion to their sizes."""
    bad_lines = BadLines(data.on_bad_line)
    sizes = [_expected_bytes(file) for file in source.files]
    unread = sum(sizes)
    documents = 0
    for file, size in zip(source.files, sizes, strict=True):
        allowance = sample_bytes * size / unread
        unread -= size
        # Keeping a fraction spreads the sample over the file; at least a tenth is kept, to limit how much is read.
        keep = 2.0**64 * (max(0.1, 2 * allowance / size) if file.holds_rows else 1.0)
        taken = 0
        for document in read_file_of(source, file, bad_lines):
            documents += 1
            identity = identify(document, dev=data.dev, test=data.test)
            if identity.split == "train" and identity.key < keep:
                text = document.text[: int(allowance - taken) + 1]
                taken += len(text.encode())
                yield text
                if taken >= allowance:
                    break
        sample_bytes -= taken
    if not documents:
        raise empty_domain(source, bad_lines.skipped)


def _expected_bytes(file: SourceFile) -> int:
    packed = file.compressed or file.format == ".parquet"
    return max(1, file.stat().st_size * (3 if packed else 1))
