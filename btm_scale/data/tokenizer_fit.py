"""Whether a tokenizer fits a pretrained model: it has the model's own tokens, and may have more."""

from __future__ import annotations

import logging
from pathlib import Path

from btm_scale.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from btm_scale.data.train_tokenizer import PROBES
from btm_scale.errors import ConfigError
from btm_scale.model.hf_config import read_shape

logger = logging.getLogger(__name__)


def require_fit(pretrained: Path, directory: Path) -> None:
    """Check a tokenizer against a pretrained model, and log that tokens without a row get one.

    Does nothing if its files are not there yet. Raises ConfigError if it has more tokens than the model has rows, and
    is not an extension of the model's own tokenizer.
    """
    if not _has_tokenizer(directory):
        return
    tokenizer, rows = Tokenizer.load(directory), read_shape(pretrained).vocabulary
    new = tokenizer.vocab_size - rows
    if new <= 0:
        return
    if not _extends(tokenizer, directory, pretrained):
        raise ConfigError(
            f"The tokenizer in {directory} has {tokenizer.vocab_size:,} tokens, but {pretrained} has embeddings of "
            f"{rows:,}. More tokens are possible only if the tokenizer extends the model's own. Remove `tokenizer` "
            "from the config."
        )
    logger.warning(
        "%d token%s of %s ha%s no row in %s: new rows start as the mean of the others.",
        new,
        "s" if new > 1 else "",
        directory,
        "ve" if new > 1 else "s",
        pretrained,
    )


def _extends(tokenizer: Tokenizer, directory: Path, pretrained: Path) -> bool:
    """Return whether a tokenizer is the model's own, or encodes text as that does."""
    if directory.resolve() == pretrained.resolve():
        return True
    if not _has_tokenizer(pretrained):
        return False
    own = Tokenizer.load(pretrained)
    return all(own.encode(probe) == tokenizer.encode(probe) for probe in PROBES)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("tokenizer.json", SENTENCEPIECE_FILE))
