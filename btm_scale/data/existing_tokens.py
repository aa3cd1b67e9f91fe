"""Documents from token files that exist already: their ids, checked against the tokenizer, and their text."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.data.formats.indexed_tokens import IndexedTokens
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import DataError

_COMPARED = 20  # documents
_COMPARED_TOKENS = 2_000  # of each
_MOST_DIFFERENT = 0.5  # of the tokens; text that was normalized before it was encoded differs in some


def read_existing(tokens: Path, tokenizer: Path | None) -> Iterator[tuple[int, str, np.ndarray[Any, Any]]]:
    """Yield (number, text, ids) of each document, numbered from 1, without the end of text after it, and the BOS before
    it if the run's documents begin with BOS.

    Raises DataError for damaged files, without a tokenizer, and for an id that the tokenizer does not have.
    """
    if tokenizer is None:
        raise DataError(f"{tokens} needs the tokenizer that made it. Set tokenizer.path to its directory.")
    loaded = _loaded(tokenizer)
    for number, ids in enumerate(IndexedTokens(tokens), start=1):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < loaded.vocab_size:
            wrong = next(int(one) for one in ids if not 0 <= one < loaded.vocab_size)
            raise DataError(
                f"{tokens}, document {number}: id {wrong} is not in the tokenizer of {loaded.vocab_size:,} tokens in "
                f"{tokenizer}. Token files are read with the tokenizer that made them: correct tokenizer.path."
            )
        if len(ids) and ids[-1] == loaded.eos:
            ids = ids[:-1]
        if loaded.begins_with_bos and len(ids) and ids[0] == loaded.bos:
            ids = ids[1:]
        yield number, loaded.decode(ids.tolist()) if len(ids) else "", ids


def other_tokenizer(tokens: Path, tokenizer: Path) -> str:
    """Return a sentence if another tokenizer has probably made the files: their text has other ids; "" if not."""
    same = total = 0
    for _, _, ids in islice(read_existing(tokens, tokenizer), _COMPARED):
        first = ids[:_COMPARED_TOKENS].tolist()
        again = _loaded(tokenizer).encode(_loaded(tokenizer).decode(first))
        total += len(first)
        same += sum(one == other for one, other in zip(first, again, strict=False))
    if not total or same > (1 - _MOST_DIFFERENT) * total:
        return ""
    return (
        f"{tokens} may be of a different tokenizer than the one in {tokenizer}, which encodes the text of its first "
        f"documents differently: {1 - same / total:.0%} of their ids. Check tokenizer.path."
    )


@functools.lru_cache(maxsize=1)
def _loaded(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)
