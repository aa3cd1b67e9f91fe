"""One domain's token files: read, placed in splits, rid of duplicates, encoded, written, fingerprinted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.data.dedup import Deduplicator, KeySet
from btm_scale.data.encode import Encoder, token_dtype
from btm_scale.data.files import resolve
from btm_scale.data.fingerprint import Fingerprint, Source, SplitCounts, settings_of
from btm_scale.data.sources import BadLines, Document, empty_domain, read_documents
from btm_scale.data.splits import Identity, TextDigest, identify
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS, RunDir
from btm_scale.util.imports import import_uncompiled

Progress = Callable[[str, int, int], None]


def write_domain(
    name: str,
    config: RunConfig,
    encoder: Encoder,
    folder: Path,
    elsewhere: dict[str, KeySet],
    on_progress: Progress,
) -> None:
    """Write train, dev and test .bin and .idx, the keys of their documents, and fingerprint.json last.

    `elsewhere` holds the keys of other domains' documents by split. Raises DataError if the domain is empty,
    or too small to split.
    """
    domain = config.all_domains[name]
    sources = [Source.of(file) for file in resolve(name, domain, config.text_root)]
    bad_lines = BadLines(config.data.on_bad_line)
    deduplicator = Deduplicator(elsewhere, _own_held_out(name, config))
    digest = TextDigest()
    writers = {split: TokenFileWriter(folder / split, encoder.tokenizer.vocab_size) for split in SPLITS}
    keys = {split: array("Q") for split in SPLITS}
    counts = {split: SplitCounts() for split in SPLITS}

    def kept() -> Iterator[tuple[str, Identity]]:
        for document, identity in _identified(name, config, bad_lines):
            digest.add(identity, document)
            if deduplicator.keep(identity):
                yield document.text, identity

    encoded_bytes = documents = 0
    for identities, ids, lengths in encoder.encode(kept()):
        ends = np.cumsum(lengths)
        for identity, end, length in zip(identities, ends, lengths, strict=True):
            writers[identity.split].add(ids[end - length : end])
            keys[identity.split].append(identity.key)
            count = counts[identity.split]
            count.documents += 1
            count.tokens += length
            count.bytes += identity.bytes
            encoded_bytes += identity.bytes
        documents += len(identities)
        on_progress(name, encoded_bytes, documents)
    for writer in writers.values():
        writer.close()
    for split in SPLITS:
        np.save(folder / _keys_file(split), np.frombuffer(keys[split], dtype=np.uint64))
    if not documents:
        raise empty_domain(name, len(sources), bad_lines.skipped)
    require_enough(name, config, counts)
    Fingerprint(
        domain=name,
        sources=sources,
        settings=settings_of(domain, config.data),
        tokenizer=encoder.tokenizer.digest,
        dtype=token_dtype(encoder.tokenizer.vocab_size).__name__,
        text=digest.hexdigest(),
        splits=counts,
        skipped_lines=bad_lines.skipped,
        duplicates=deduplicator.dropped,
    ).write(folder / "fingerprint.json")


def digest_of_text(name: str, config: RunConfig) -> str:
    """The digest that a fingerprint of the domain's text as it is now would have."""
    digest = TextDigest()
    for document, identity in _identified(name, config, BadLines(config.data.on_bad_line)):
        digest.add(identity, document)
    return digest.hexdigest()


def _identified(name: str, config: RunConfig, bad_lines: BadLines) -> Iterator[tuple[Document, Identity]]:
    for document in read_documents(name, config.all_domains[name], config.text_root, on_bad_line=bad_lines):
        yield document, identify(document, dev=config.data.dev, test=config.data.test)


def _keys_file(split: str) -> str:
    return f"{split}.keys.npy"


def _is_grouped(name: str, config: RunConfig) -> bool:
    return config.all_domains[name].split_by != "document"


def _own_held_out(name: str, config: RunConfig) -> dict[str, KeySet]:
    """Keys of dev and test where groups decide, for there one text may stand in two splits."""
    if not _is_grouped(name, config):
        return {}
    held_out = {split: KeySet() for split in ("dev", "test")}
    for _, identity in _identified(name, config, BadLines(config.data.on_bad_line)):
        if identity.split in held_out:
            held_out[identity.split].add(identity.key)
    return held_out


def keys_elsewhere(name: str, config: RunConfig, run: RunDir) -> dict[str, KeySet]:
    """Keys by split of the documents in other domains' finished token files.

    Empty where every domain places documents by their text: equal texts then share a split everywhere.
    """
    others = [other for other in config.all_domains if other != name and run.fingerprint(other).exists()]
    if not any(_is_grouped(domain, config) for domain in (name, *others)):
        return {}
    found = {split: KeySet() for split in SPLITS}
    for other in others:
        for split in SPLITS:
            for key in np.load(run.domain(other) / _keys_file(split), mmap_mode="r"):
                found[split].add(int(key))
    return found


def require_enough(name: str, config: RunConfig, counts: dict[str, SplitCounts]) -> None:
    """Raise DataError unless every split that is used fills one sequence."""
    needed = config.budget.sequence_length + 1
    # A novel domain is only scored.
    splits = SPLITS if name in config.expert_domains else ("dev", "test")
    if all(counts[split].tokens >= needed for split in splits):
        return
    have = ", ".join(
        f"{split} has {counts[split].documents} documents with {counts[split].tokens} tokens" for split in splits
    )
    remedy = "Give it more text, raise data.dev or data.test, or lower budget.sequence_length."
    if _is_grouped(name, config):
        remedy += " It is split by groups of documents; smaller groups, or split_by: document, spread more evenly."
    raise DataError(
        f"domain '{name}' is too small to split: {have}; each needs at least {needed} tokens "
        f"(budget.sequence_length + 1). {remedy}"
    )


class TokenFileWriter:
    """A Megatron-core indexed dataset, `prefix`.bin and `prefix`.idx, written document by document."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        import_uncompiled("megatron.core")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(vocab_size))
        # Its lists take 72 bytes a document, arrays 12.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])

    def add(self, ids: np.ndarray[Any, Any]) -> None:
        """Append a document, ids [tokens]."""
        self._builder.add_document(ids, [len(ids)])

    def close(self) -> None:
        """Write the index, without which the files are nothing."""
        self._builder.finalize(f"{self._prefix}.idx")
