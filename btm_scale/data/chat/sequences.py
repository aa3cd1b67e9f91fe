"""The training sequences of a domain of conversations, addressed by index."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.data.chat.packing import flagged, packed, sequence_of, trained_pieces
from btm_scale.data.token_index import TokenSequences
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir
from btm_scale.util.imports import torch  # in a worker that encodes text it would take most of the memory

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


class ChatSequences:
    """Sequences of packed conversations. Each pass over the text packs them anew, in an order of the seed alone."""

    def __init__(self, run: RunDir, domain: str, dtype: str, length: int, end_of_text: int, index: Path) -> None:
        prefix = run.tokens(domain, "train")
        self._tokens = np.memmap(prefix.with_suffix(".bin"), np.dtype(dtype), "r")
        self._mask = np.memmap(run.mask(domain, "train"), np.uint8, "r")
        self._domain, self._length, self._end_of_text = domain, length, end_of_text
        self._lengths = TokenSequences(prefix).lengths
        self._paths = index / f"{domain}-pieces.npy", index / f"{domain}-rows.npy"
        self._pieces = self._rows = np.empty(0, np.int64)

    def write_index(self, samples: int, seed: int, documents: Array) -> None:
        """Write the order of at least `samples` sequences of these documents. Raises DataError if they have no answer
        that fits."""
        starts = np.cumsum(self._lengths) - self._lengths
        pieces, _ = trained_pieces(starts[documents], self._lengths[documents], self._mask, self._length)
        if not len(pieces):
            raise DataError(
                f"The conversations of domain '{self._domain}' have no answer with a token before it. Add "
                "conversations, or raise budget.sequence_length."
            )
        order: list[Array] = []
        sizes: list[int] = []
        for epoch in range(samples + 1):
            random = np.random.RandomState([seed, epoch])  # NumPy guarantees its stream
            shuffled = pieces[random.permutation(len(pieces))]
            rows = packed((shuffled[:, 1] - shuffled[:, 0]).tolist(), self._length)
            for row in random.permutation(len(rows)):
                order.append(shuffled[rows[row]])
                sizes.append(len(rows[row]))
            if len(sizes) >= samples:
                break
        for path, array in zip(self._paths, (np.concatenate(order), np.cumsum([0, *sizes])), strict=True):
            np.save(path, array)

    def open_index(self) -> ChatSequences:
        """Read the order. Raises DataError if it is damaged."""
        try:
            self._pieces, self._rows = (np.load(path, mmap_mode="r") for path in self._paths)
        except (OSError, ValueError, EOFError):
            raise DataError(
                f"{self._paths[0].parent} lacks the order of '{self._domain}': it was damaged after it was written. "
                "Delete it, and the order is determined again."
            ) from None
        return self

    def __getitem__(self, number: int) -> torch.Tensor:
        """Return a sequence with flags: int64 [length + 1]."""
        parts = [flagged(self._tokens[begin:end], self._mask[begin:end]) for begin, end in self._pieces_in(number)]
        return torch.from_numpy(sequence_of(parts, self._length, self._end_of_text))

    def lengths_in(self, number: int) -> Array:
        """Return the tokens of each conversation in the inputs of a sequence, and of what fills it up, int64."""
        pieces = self._pieces_in(number)
        lengths = pieces[:, 1] - pieces[:, 0]
        lengths = np.append(lengths, self._length - lengths.sum())
        return lengths[lengths > 0]

    def _pieces_in(self, number: int) -> Array:
        pieces: Array = self._pieces[self._rows[number] : self._rows[number + 1]]
        return pieces


def tokens_of_pass(domain: str, folder: Path, length: int) -> int:
    """Return the tokens of the sequences of one pass over a domain's training text, the same for every order.

    Logs how many times turns that are longer than a sequence are cut.
    """
    mask = folder / "train.mask"
    if not mask.stat().st_size:
        return 0
    lengths = TokenSequences(folder / "train").lengths
    pieces, cut = trained_pieces(np.cumsum(lengths) - lengths, lengths, np.memmap(mask, np.uint8, "r"), length)
    if cut:
        logger.warning(
            "Domain '%s': turns that have more than the %d tokens of budget.sequence_length are cut at their "
            "beginning, %d times. Raise it to keep them complete.",
            domain,
            length,
            cut,
        )
    return length * len(packed((pieces[:, 1] - pieces[:, 0]).tolist(), length))


def most_samples(weight: float, samples: int, domains: int) -> int:
    """Return the most samples of a domain that are among the first `samples` of a mixture of this many domains."""
    # Until a time t, each domain has at least t x weight - 1/2 samples, and at most 1/2 more than t x weight.
    return min(samples, int(np.ceil((samples + domains) * weight)) + 1)


def blended(weights: list[float], samples: int) -> tuple[Array, Array]:
    """Return the domain of each sample, int16, and its number within the domain: evenly mixed at weights that sum to 1.

    The order of more samples begins with that of fewer.
    """
    counts = [most_samples(weight, samples, len(weights)) for weight in weights]
    domains = np.concatenate([np.full(count, domain, np.int16) for domain, count in enumerate(counts)])
    numbers = np.concatenate([np.arange(count) for count in counts])
    times = (numbers + 0.5) / np.array(weights)[domains]
    order = np.lexsort((domains, times))[:samples]
    return domains[order], numbers[order]
