"""Copy an existing tokenizer into a run, in the form in which experts are published."""

from __future__ import annotations

import logging
from pathlib import Path

from btm_scale.checkpoint.merge.tokenizer_files import read_parts
from btm_scale.data.sentencepiece_json import write_json
from btm_scale.data.tokenizer import SentencePieceTokenizer, Tokenizer, TransformersTokenizer, first_line
from btm_scale.data.tokenizer_files import (
    CHAT_TEMPLATE,
    DOCUMENT_START,
    NAMED_TEMPLATES,
    SENTENCEPIECE_FILE,
    TEKKEN_FILE,
    tiktoken_files,
)
from btm_scale.errors import DataError
from btm_scale.util.files import make_directory
from btm_scale.util.inside import as_private_as, copy_inside, file_inside

logger = logging.getLogger(__name__)

_COPIED_FILES = (
    SENTENCEPIECE_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
PROBES = (
    "def f(x):\n\treturn  x ** 2  # 1234\n",
    r"Let $\mathcal{O}_X$ be \emph{coherent}; see 3.14.",
    " Naïve café, 北京, 🎉 and an ellipsis … at the end \n\n",
)


def adopt_tokenizer(directory: Path, source: Path, *, bos: bool = False) -> None:
    """Copy an existing tokenizer. With `bos`, each document of the run begins with its BOS token.

    A sentencepiece model without a tokenizer.json, and a tekken.json, get one. Raises DataError if sentencepiece or
    transformers cannot load it, and for `bos` without such a token.
    """
    own = Tokenizer.load(source)
    if bos:
        require_bos(own, source)
    if loss := loss_of(own, source):
        logger.warning("%s", loss)
    if isinstance(own, SentencePieceTokenizer) and not any((source / name).is_file() for name in _HUGGING_FACE_FILES):
        _adopt_sentencepiece(directory, source, own)
    else:
        _adopt_published(directory, source, own)
    if bos:
        begin_with_bos(directory)


def begin_with_bos(directory: Path) -> None:
    """Record in a run's tokenizer that documents begin with BOS."""
    (directory / DOCUMENT_START).write_text('{"start": "bos"}\n', encoding="utf-8")


def require_bos(tokenizer: Tokenizer, source: Path) -> None:
    """Raise DataError if a tokenizer has no BOS token with which documents can begin."""
    if tokenizer.bos is None:
        raise DataError(
            f"tokenizer.bos is true, but the tokenizer in {source} has no bos_token. Documents then begin with it: "
            "remove tokenizer.bos, or name the token in tokenizer_config.json."
        )


def _adopt_published(directory: Path, source: Path, own: Tokenizer) -> None:
    reference = own if isinstance(own, TransformersTokenizer) else _published_form(source)
    _report_others(source, reference)
    if own is not reference and all(own.encode(probe) == reference.encode(probe) for probe in PROBES):
        for name in _COPIED_FILES:
            if (source / name).is_file():
                copy_inside(source, name, directory)
        _copy_templates(source, directory)
        return
    # Saved anew, because what AutoTokenizer loads may depend on the config.json of a model.
    try:
        reference.save(directory)
    except ValueError as error:  # the name of a chat template may lead out of the directory
        raise DataError(
            f"The tokenizer in {source} cannot be copied: {first_line(error)}. Correct its files."
        ) from None
    as_private_as([source], directory)


def _copy_templates(source: Path, directory: Path) -> None:
    """Copy the files of chat templates, which need no library to be read."""
    named = sorted(source.glob(f"{NAMED_TEMPLATES}/*.jinja"))
    if named:
        make_directory(directory / NAMED_TEMPLATES)
    for name in [CHAT_TEMPLATE, *(f"{NAMED_TEMPLATES}/{path.name}" for path in named)]:
        if (source / name).is_file():
            copy_inside(source, name, directory)


def _report_others(source: Path, used: TransformersTokenizer) -> None:
    """Log which files with a vocabulary are not used, because a tokenizer.json is beside them."""
    if not (source / "tokenizer.json").is_file():
        return
    vocabulary = used.vocabulary()
    for name in (TEKKEN_FILE, *tiktoken_files(source)):
        if not (source / name).is_file():
            continue
        try:
            tokens = read_parts(file_inside(source, name))["vocabulary"]
        except (ValueError, LookupError) as error:
            logger.info("%s is not used: its tokenizer.json is (%s is %s)", source / name, name, first_line(error))
            continue
        if different := sum(vocabulary.get(token) != row for token, row in tokens.items()):
            logger.warning(
                "%s is not used: its tokenizer.json is, in which %s of the %s tokens have another id or are missing",
                source / name,
                f"{different:,}",
                f"{len(tokens):,}",
            )
        else:
            logger.info("%s is not used: its tokenizer.json is, with the same tokens", source / name)


def loss_of(tokenizer: Tokenizer, source: Path) -> str:
    """Return a sentence with an example if decoding does not give back every text; "" if it does."""
    for probe in PROBES:
        again = tokenizer.decode(tokenizer.encode(probe))
        if again != probe:
            return (
                f"The tokenizer in {source} is lossy: it decodes {probe!r} as {again!r}. Models generate text as it is "
                "decoded."
            )
    return ""


def _adopt_sentencepiece(directory: Path, source: Path, own: SentencePieceTokenizer) -> None:
    copy_inside(source, SENTENCEPIECE_FILE, directory)
    _copy_templates(source, directory)
    refusal = f"Experts are published with a tokenizer.json, and {source / SENTENCEPIECE_FILE} cannot have one: "
    remedy = "Convert it with the tool of its model, and add the tokenizer.json."
    try:
        write_json(source / SENTENCEPIECE_FILE, directory)
    except ValueError as error:
        raise DataError(f"{refusal}{first_line(error)}. {remedy}") from None
    converted = TransformersTokenizer.of(directory)
    if different := [probe for probe in PROBES if own.encode(probe) != converted.encode(probe)]:
        raise DataError(f"{refusal}its ids of {different[0]!r} differ. {remedy}")


def _published_form(source: Path) -> TransformersTokenizer:
    try:
        return TransformersTokenizer.of(source)
    except DataError as error:
        raise DataError(
            f"{error} Experts are published with a tokenizer of that form: add tokenizer.json and its config."
        ) from None
