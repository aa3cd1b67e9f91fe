"""Whether a tokenizer fits a pretrained model: it has the model's own tokens, and may have more."""

from __future__ import annotations

import logging
from pathlib import Path

from btm_scale.data.adopt_tokenizer import PROBES
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.tokenizer_files import has_tokenizer
from btm_scale.errors import ConfigError
from btm_scale.model.hf_config import read_shape

logger = logging.getLogger(__name__)


def require_fit(pretrained: Path, directory: Path, *, bos: bool = False) -> None:
    """Check a tokenizer against a pretrained model. Logs that tokens without a row get one, and that documents begin
    without the BOS token with which the tokenizer begins texts.

    Does nothing if its files are not there yet. Raises ConfigError if it has more tokens than the model has rows, and
    is not an extension of the model's own tokenizer.
    """
    if not has_tokenizer(directory):
        return
    tokenizer, rows = Tokenizer.load(directory), read_shape(pretrained).vocabulary
    new = tokenizer.vocab_size - rows
    if new > 0:
        _require_extension(tokenizer, directory, pretrained, rows)
        logger.warning(
            "%d token%s of %s ha%s no row in %s: new rows start as the mean of the others.",
            new,
            "s" if new > 1 else "",
            directory,
            "ve" if new > 1 else "s",
            pretrained,
        )
    if not bos and tokenizer.adds_bos():
        logger.warning(
            "%s begins each text with its BOS token, and the documents of this run begin without: set tokenizer.bos if "
            "%s was trained that way.",
            directory,
            pretrained,
        )


def _require_extension(tokenizer: Tokenizer, directory: Path, pretrained: Path, rows: int) -> None:
    """Raise ConfigError unless a tokenizer is the model's own, or encodes text as that does."""
    if directory.resolve() == pretrained.resolve():
        return
    if has_tokenizer(pretrained):
        own = Tokenizer.load(pretrained)
        if all(own.encode(probe) == tokenizer.encode(probe) for probe in PROBES):
            return
    raise ConfigError(
        f"The tokenizer in {directory} has {tokenizer.vocab_size:,} tokens, but {pretrained} has embeddings of "
        f"{rows:,}. More tokens are possible only if the tokenizer extends the model's own. Remove `tokenizer` from "
        "the config."
    )
