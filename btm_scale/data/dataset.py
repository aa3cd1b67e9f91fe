"""Training samples in one fixed order, addressed by index, so that any rank can resume anywhere."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from btm_scale.data.chat.packing import as_flagged
from btm_scale.data.chat.sequences import ChatSequences, blended, most_samples
from btm_scale.data.document_lengths import lengths_in_sample
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.token_index import TokenSequences
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import CheckpointError, DataError
from btm_scale.run_dir import RunDir
from btm_scale.util.files import new_directory

# It warns that an index is not cached, although TrainingSamples caches it.
logging.getLogger("megatron.core.datasets.blended_dataset").setLevel(logging.ERROR)

# Fraction of extra samples that are drawn from each domain, to absorb rounding in the blend.
_SURPLUS = 0.005


@dataclass(frozen=True)
class _Vocabulary:
    """The attributes of a tokenizer that GPTDataset reads."""

    vocab_size: int
    eod: int

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size, "eod": self.eod}


class TrainingSamples:
    """`samples` sequences of the train splits of `weights`' domains, packed and shuffled by `seed`.

    The order depends only on the token files, the weights, `sequence_length`, `samples` (the run's total), `seed` and
    `part`; the text is repeated as often as `samples` requires. `part=(i, n)` keeps the documents in the i-th of n
    random parts, the same parts for every seed.

    In a torch.distributed world, all ranks construct this object together: the first writes the index if it is not in
    the run's cache, and the others wait. Several groups can do so at once. Raises DataError if a domain is not
    prepared, was prepared with a tokenizer other than the run's `tokenizer`, or has too little text.
    """

    def __init__(
        self,
        run: RunDir,
        weights: Mapping[str, float],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        samples: int,
        seed: int,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.samples = samples
        self._run = run
        self._weights = _normalised(weights)
        self._part = part
        self._config: dict[str, Any] = {
            "random_seed": seed,
            "sequence_length": sequence_length,
            "tokenizer": _Vocabulary(tokenizer.vocab_size, tokenizer.eos),
        }
        fingerprints = {name: Fingerprint.of_domain(run, name) for name in self._weights}
        # Samples have flags if any domain of the mixture is one of conversations.
        self._chats = {name: one.dtype for name, one in fingerprints.items() if one.has_chats}
        cache = run.index_cache / self._key(tokenizer.digest, fingerprints)
        try:
            if _rank() == 0 and not cache.is_dir():
                self._write_index(cache)
        finally:
            _barrier()
        self._domains = self._open(cache)
        self._domain_of, self._sample_of = (self._load_order(cache / name) for name in ("domain.npy", "sample.npy"))

    def read(self, first: int, count: int) -> torch.Tensor:
        """Return samples `first` to `first + count - 1`, int64 [count, sequence_length + 1].

        Inputs are [:, :-1] and labels [:, 1:]. In a mixture with conversations, ids have the flags of
        `data/chat/packing.py`.
        """
        self._require(first, count)
        return self.select(range(first, first + count))

    def select(self, numbers: Sequence[int]) -> torch.Tensor:
        """Return these samples as `read` does."""
        return torch.stack([self._sample(number) for number in numbers])

    def document_lengths(self, first: int, count: int) -> list[np.ndarray[Any, Any]]:
        """Return the lengths of the documents in the inputs of samples `first` to `first + count - 1`, in tokens.

        They are read from the index, without the tokens.
        """
        self._require(first, count)
        return [
            lengths_in_sample(self._domains[int(self._domain_of[number])], int(self._sample_of[number]))
            for number in range(first, first + count)
        ]

    def _require(self, first: int, count: int) -> None:
        if first < 0 or first + count > self.samples:
            raise IndexError(f"samples [{first}, {first + count}) are out of range: there are {self.samples}")

    def domains(self, numbers: Sequence[int]) -> list[str]:
        """Return the domain of each of these samples."""
        names = list(self._weights)
        return [names[int(self._domain_of[number])] for number in numbers]

    def _sample(self, number: int) -> torch.Tensor:
        domain = self._domains[int(self._domain_of[number])]
        if isinstance(domain, ChatSequences):
            return domain[int(self._sample_of[number])]
        sample = domain[int(self._sample_of[number])]
        sequence = torch.cat([sample["tokens"], sample["labels"][-1:]])
        if self._chats:
            return torch.from_numpy(as_flagged(sequence.numpy(), self._config["tokenizer"].eod))
        return sequence

    def _key(self, tokenizer: str, fingerprints: Mapping[str, Fingerprint]) -> str:
        """Return a digest of everything that the order depends on."""
        for fingerprint in fingerprints.values():
            fingerprint.require_tokenizer(tokenizer, self._run)
            fingerprint.require_whole(self._run)
        contents = {
            name: [one.text, one.tokenizer, one.settings, one.splits["train"].model_dump()]
            for name, one in fingerprints.items()
        }
        vocabulary = self._config["tokenizer"].unique_identifiers
        parts = [self._config | {"tokenizer": vocabulary}, self._weights, self.samples, self._part, contents]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _write_index(self, cache: Path) -> None:
        """Build every index in a temporary folder, and publish that as the cache."""
        try:
            with new_directory(cache, shared=True) as directory:
                self._write_index_files(directory)
        except CheckpointError:
            if not cache.is_dir():  # else another group was faster with the same index
                raise

    def _write_index_files(self, directory: Path) -> None:
        for name, weight in self._weights.items():
            if name in self._chats:
                samples, seed = self._samples_of(weight), self._config["random_seed"]
                self._chat_sequences(name, directory).write_index(samples, seed, self._documents_of(name))
        domains = self._open(directory)
        if self._chats:
            domain_of, sample_of = blended(list(self._weights.values()), self.samples)
        elif len(domains) > 1:
            # Without a cache, because with one BlendedDataset needs a process group.
            blend = BlendedDataset(domains, list(self._weights.values()), self.samples, self._megatron_config(None))
            domain_of, sample_of = blend.dataset_index, blend.dataset_sample_index
        else:
            domain_of, sample_of = np.zeros(self.samples, np.int16), np.arange(self.samples)
        np.save(directory / "domain.npy", domain_of)
        np.save(directory / "sample.npy", sample_of)

    def _load_order(self, path: Path) -> np.ndarray:
        try:
            order = np.load(path, mmap_mode="r")
            is_intact = order.shape == (self.samples,) and np.issubdtype(order.dtype, np.integer)
        except (OSError, ValueError, EOFError):
            is_intact = False
        if not is_intact:
            raise DataError(
                f"{path} is not the order of {self.samples} samples: it was damaged after it was written. Delete "
                f"{path.parent}, and the order is determined again."
            )
        return order

    def _open(self, cache: Path) -> list[GPTDataset | ChatSequences]:
        return [
            self._chat_sequences(name, cache).open_index()
            if name in self._chats
            else self._open_domain(name, weight, cache)
            for name, weight in self._weights.items()
        ]

    def _chat_sequences(self, name: str, cache: Path) -> ChatSequences:
        end_of_text = self._config["tokenizer"].eod
        return ChatSequences(self._run, name, self._chats[name], self._config["sequence_length"], end_of_text, cache)

    def _open_domain(self, name: str, weight: float, cache: Path) -> GPTDataset:
        tokens = IndexedDataset(str(self._run.tokens(name, "train")))
        documents, samples = self._documents_of(name), self._samples_of(weight)
        return GPTDataset(tokens, f"{name}/train", documents, samples, Split.train, self._megatron_config(cache))

    def _documents_of(self, name: str) -> np.ndarray[Any, Any]:
        """Return the documents of a domain that are in the part. Raises DataError if they fill no sequence."""
        lengths = TokenSequences(self._run.tokens(name, "train")).lengths
        documents = np.arange(len(lengths), dtype=np.int32)
        if self._part is not None:
            which, parts = self._part
            # NumPy guarantees RandomState's stream; the parts must never change.
            documents = documents[np.random.RandomState(0).randint(parts, size=len(documents)) == which]
            if int(lengths[documents].sum()) <= self._config["sequence_length"]:
                raise DataError(
                    f"Part {which + 1} of {parts} of domain '{name}' has {len(documents)} documents, too few "
                    "for one sequence. Add text to the domain, or use fewer parts."
                )
        return documents

    def _samples_of(self, weight: float) -> int:
        if len(self._weights) == 1:
            return self.samples
        most = most_samples(weight, self.samples, len(self._weights)) if self._chats else 0
        return max(most, int(np.ceil(self.samples * weight * (1 + _SURPLUS))) + 1)

    def _megatron_config(self, cache: Path | None) -> GPTDatasetConfig:
        return GPTDatasetConfig(
            **self._config,
            path_to_cache=None if cache is None else str(cache),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )


def _normalised(weights: Mapping[str, float]) -> dict[str, float]:
    used = {name: weights[name] for name in sorted(weights) if weights[name] > 0}
    if not used:
        raise DataError("No domain has a weight above 0. Give at least one domain a positive weight.")
    total = sum(used.values())
    return {name: weight / total for name, weight in used.items()}


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
