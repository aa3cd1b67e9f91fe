"""Write one domain's token files: read documents, place them in splits, drop duplicates, encode, fingerprint."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.config.data import DataConfig
from btm_scale.config.run import RunConfig
from btm_scale.data.dedup import Deduplicator, KeySet, held_out_keys, save_keys
from btm_scale.data.documents import BadLines, empty_domain, expected_bytes, read_documents
from btm_scale.data.encode import Encoder, Text, token_dtype
from btm_scale.data.enough import needed_splits, require_enough
from btm_scale.data.fingerprint import Fingerprint, Source, SplitCounts, TextDigest, settings_of
from btm_scale.data.progress import Progress
from btm_scale.data.sources import DomainSource
from btm_scale.data.splits import Identity, Placement, placement_of
from btm_scale.run_dir import SPLITS
from btm_scale.util.imports import import_uncompiled


def write_domain(
    source: DomainSource,
    config: RunConfig,
    encoder: Encoder,
    folder: Path,
    elsewhere: dict[str, KeySet],
    on_progress: Progress,
    placement: Placement | None = None,
) -> Fingerprint:
    """Write .bin and .idx of train, dev and test, the keys of their documents, and fingerprint.json last.

    `elsewhere` holds the keys of other domains' documents by split, `placement` how this domain is split. Returns the
    fingerprint. Raises DataError if the domain is empty or too small to split.
    """
    data = config.data
    placement = placement or placement_of(source, data, needed_splits(source, config))
    files = [Source.of(file) for file in source.files]
    bad_lines = BadLines(data.on_bad_line)
    deduplicator = Deduplicator(elsewhere, _own_held_out(source, data, placement))
    digest = TextDigest()
    writers = {split: TokenFileWriter(folder / split, encoder.tokenizer.vocab_size) for split in SPLITS}
    keys = {split: array("Q") for split in SPLITS}
    counts = {split: SplitCounts() for split in SPLITS}

    def kept() -> Iterator[tuple[Text, Identity]]:
        for document, identity in placement.placed(read_documents(source, bad_lines)):
            digest.add(identity)
            if deduplicator.keep(identity):
                yield document.text if document.ids is None else document.ids, identity

    expected = sum(map(expected_bytes, source.files))
    expected = min(expected, source.settings.max_bytes or expected)
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
        on_progress(source.name, encoded_bytes, documents, expected)
    for writer in writers.values():
        writer.close()
    save_keys(folder, keys)
    if not documents:
        raise empty_domain(source, bad_lines.skipped)
    require_enough(source, config, counts)
    bad_lines.warn(source.name)
    fingerprint = Fingerprint(
        domain=source.name,
        sources=files,
        settings=settings_of(source, data),
        tokenizer=encoder.tokenizer.digest,
        dtype=token_dtype(encoder.tokenizer.vocab_size).__name__,
        text=digest.hexdigest(),
        splits=counts,
        skipped_lines=bad_lines.skipped,
        duplicates=deduplicator.dropped,
        placement=placement.name,
        skipped={name: str(loss) for name, loss in bad_lines.losses.items()},
    )
    fingerprint.write(folder / "fingerprint.json")
    return fingerprint


def digest_of_text(source: DomainSource, data: DataConfig, placement: Placement) -> str:
    """Return the text digest that a fingerprint of the domain would have now."""
    digest = TextDigest()
    for _, identity in placement.placed(read_documents(source, BadLines(data.on_bad_line))):
        digest.add(identity)
    return digest.hexdigest()


def _own_held_out(source: DomainSource, data: DataConfig, placement: Placement) -> dict[str, KeySet]:
    """Return the keys of dev and test if the text itself does not place it, because it may then be in two splits."""
    if not source.is_grouped and placement.name != "position":
        return {}
    documents = read_documents(source, BadLines(data.on_bad_line))
    return held_out_keys(identity for _, identity in placement.placed(documents))


class TokenFileWriter:
    """A Megatron-core indexed dataset, `prefix`.bin and `prefix`.idx, written document by document."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        import_uncompiled("megatron.core")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(vocab_size))
        # Its lists take 72 bytes per document, arrays 12.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])

    def add(self, ids: np.ndarray[Any, Any]) -> None:
        """Append a document, ids [tokens]."""
        self._builder.add_document(ids, [len(ids)])

    def close(self) -> None:
        """Write the index, without which the token file cannot be read."""
        self._builder.finalize(f"{self._prefix}.idx")
