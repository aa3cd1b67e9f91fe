"""Write one domain's token files: read documents, place them in splits, drop duplicates, encode, fingerprint."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.config.data import DataConfig
from btm_scale.config.run import RunConfig
from btm_scale.data.chat.encode import ChatEncoding, encode_chats
from btm_scale.data.chat.mask_files import MaskWriter, Refusals
from btm_scale.data.chat.sequences import tokens_of_pass
from btm_scale.data.dedup import Deduplicator, KeySet, held_out_keys, save_keys
from btm_scale.data.documents import BadLines, Document, empty_domain, expected_bytes_of, read_documents
from btm_scale.data.encode import Encoder, Ids, Text, token_dtype
from btm_scale.data.enough import needed_splits, require_enough
from btm_scale.data.fingerprint import Fingerprint, Source, SplitCounts, TextDigest, settings_of
from btm_scale.data.formats.indexed_tokens import write_index
from btm_scale.data.journal import DOCUMENT, SHARD_BYTES, Journal, Replay, Shard, TextChangedError
from btm_scale.data.progress import CHECKING, Progress, reported
from btm_scale.data.sources import DomainSource
from btm_scale.data.splits import Identity, Placement, placement_of
from btm_scale.run_dir import SPLITS

_SHARD_DOCUMENTS = 100_000
_REPORTED_AT_ONCE = 10_000  # documents that are only read, between two reports of progress


def write_domain(
    source: DomainSource,
    config: RunConfig,
    encoder: Encoder,
    folder: Path,
    elsewhere: dict[str, KeySet],
    on_progress: Progress,
    placement: Placement | None = None,
    journal: Journal | None = None,
) -> Fingerprint:
    """Write .bin and .idx of train, dev and test, the keys of their documents, and fingerprint.json last.

    `elsewhere` holds the keys of other domains' documents by split, `placement` how this domain is split. The
    documents that an interrupted process left in `journal` are not encoded again, and others are added to it. Returns
    the fingerprint. Raises DataError if the domain is empty or too small to split, and TextChangedError if its text is
    not that of the journal.
    """
    data = config.data
    placement = placement or placement_of(source, data, needed_splits(source, config))
    files = [Source.of(file) for file in source.files]
    bad_lines = BadLines(data.on_bad_line)
    deduplicator = Deduplicator(elsewhere, _own_held_out(source, data, placement))
    digest = TextDigest()
    output = _Output(folder, encoder.tokenizer.vocab_size, journal, has_mask=source.settings.chat is not None)
    replay = Replay(journal) if journal is not None else None
    expected = expected_bytes_of(source)

    chats = ChatEncoding.of(source, encoder.tokenizer.directory) if source.settings.chat is not None else None
    refused = Refusals(source, data.on_bad_line)

    def to_encode() -> Iterator[tuple[Text, tuple[Identity, str]]]:
        for document, identity in placement.placed(read_documents(source, bad_lines)):
            digest.add(identity)
            if not deduplicator.keep(identity):
                continue
            if replay is None or not replay.left:
                yield document.text if document.ids is None else document.ids, (identity, document.origin)
                continue
            tokens = replay.take(identity.split, identity.key)
            if not tokens and chats is not None:  # a conversation that was refused, for a reason to be found again
                problem = encode_chats(chats, encoder.tokenizer, [document.text])[0].problem
                # A limit of time may be exceeded on a busy machine only.
                refused.add(document.origin, problem or "the chat template exceeded a limit in an interrupted process")
            output.add_encoded(identity, tokens)
            if output.documents % _REPORTED_AT_ONCE == 0 or not replay.left:
                on_progress(source.name, output.bytes, output.documents, expected)
        if replay is not None and replay.left:
            raise TextChangedError

    for encoded in encoder.encode(to_encode(), chats):
        for number, problem in encoded.tokens.problems.items():
            refused.add(encoded.tags[number][1], problem)
        output.add([identity for identity, _ in encoded.tags], encoded.tokens)
        on_progress(source.name, output.bytes, output.documents, expected)
    output.close()
    bad_lines.add(refused.lines)
    if not output.documents:
        raise empty_domain(source, bad_lines)
    counts = output.counts
    require_enough(source, config, counts)
    bad_lines.warn(source.name)
    if chats is not None:
        counts["train"].read = tokens_of_pass(source.name, folder, config.budget.sequence_length)
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


def digest_of_text(
    source: DomainSource, data: DataConfig, placement: Placement, on_progress: Progress | None = None
) -> str:
    """Return the text digest that a fingerprint of the domain would have now."""
    digest = TextDigest()
    documents: Iterable[Document] = read_documents(source, BadLines(data.on_bad_line))
    if on_progress is not None:
        name, expected = CHECKING.format(source.name), expected_bytes_of(source)
        documents = reported(documents, lambda document: len(document.text), name, expected, on_progress)
    for _, identity in placement.placed(documents):
        digest.add(identity)
    return digest.hexdigest()


def _own_held_out(source: DomainSource, data: DataConfig, placement: Placement) -> dict[str, KeySet]:
    """Return the keys of dev and test if the text itself does not place it, because it may then be in two splits."""
    if not source.is_grouped and placement.name != "position":
        return {}
    documents = read_documents(source, BadLines(data.on_bad_line))
    return held_out_keys(identity for _, identity in placement.placed(documents))


class _Output:
    """The token files of a domain, with the keys and counts of each split."""

    def __init__(self, folder: Path, vocab_size: int, journal: Journal | None, *, has_mask: bool) -> None:
        self.documents = self.bytes = 0
        self.counts = {split: SplitCounts() for split in SPLITS}
        self._folder = folder
        self._journal = journal
        ends = journal.ends if journal is not None else dict.fromkeys(SPLITS, 0)
        self._writers = {split: TokenFileWriter(folder / split, vocab_size, ends[split]) for split in SPLITS}
        mask_ends = journal.mask_ends if journal is not None else {}
        self._masks = {split: MaskWriter(folder, split, mask_ends.get(split, 0)) for split in SPLITS if has_mask}
        self._keys = {split: array("Q") for split in SPLITS}
        self._shard: list[tuple[int, int, int]] = []
        self._shard_bytes = 0

    def add_encoded(self, identity: Identity, tokens: int) -> None:
        """Add a document whose tokens have been written by an interrupted process; one without any was refused."""
        if tokens:
            self._writers[identity.split].add_length(tokens)
            self._count(identity, tokens)

    def add(self, identities: list[Identity], tokens: Ids) -> None:
        """Add documents. One without tokens was refused, which only the journal records."""
        for identity, end, length in zip(identities, np.cumsum(tokens.lengths), tokens.lengths, strict=True):
            if length:
                self._writers[identity.split].add(tokens.ids[end - length : end])
                self._count(identity, length)
            if tokens.mask is not None:
                self._masks[identity.split].add(tokens.mask[end - length : end])
            self._shard.append((SPLITS.index(identity.split), identity.key, length))
            self._shard_bytes += identity.bytes
        is_full = self._shard_bytes >= SHARD_BYTES or len(self._shard) >= _SHARD_DOCUMENTS
        if self._journal is not None and is_full:
            written = {split: writer.flush() for split, writer in self._writers.items()}
            ends = {split: end for split, (end, _) in written.items()}
            digests = {split: digest for split, (_, digest) in written.items()}
            masks = {split: writer.flush() for split, writer in self._masks.items()}
            self._journal.add(Shard(np.array(self._shard, DOCUMENT), ends, digests, masks))
        if self._journal is None or is_full:
            self._shard, self._shard_bytes = [], 0

    def close(self) -> None:
        """Write the index of each token file, and the keys."""
        for writer in self._writers.values():
            writer.close()
        for split, mask in self._masks.items():
            self.counts[split].trained = mask.close()
        save_keys(self._folder, self._keys)

    def _count(self, identity: Identity, tokens: int) -> None:
        count = self.counts[identity.split]
        count.documents += 1
        count.tokens += tokens
        count.bytes += identity.bytes
        self._keys[identity.split].append(identity.key)
        self.documents += 1
        self.bytes += identity.bytes


class TokenFileWriter:
    """A Megatron-core indexed dataset, `prefix`.bin and `prefix`.idx, written document by document.

    The first `kept` bytes of an existing token file stay; their documents are added with `add_length`.
    """

    def __init__(self, prefix: Path, vocab_size: int, kept: int = 0) -> None:
        self._prefix = prefix
        self._dtype = token_dtype(vocab_size)
        self._file = Path(f"{prefix}.bin").open("r+b" if kept else "wb")  # noqa: SIM115 (closed by `close`)
        self._file.truncate(kept)
        self._file.seek(kept)
        self._digest = hashlib.sha256()
        self._lengths = array("i")

    def add(self, ids: np.ndarray[Any, Any]) -> None:
        """Append a document, ids [tokens]."""
        content = np.ascontiguousarray(ids, self._dtype).data
        self._file.write(content)
        self._digest.update(content)
        self.add_length(len(ids))

    def add_length(self, tokens: int) -> None:
        """Append a document whose tokens are in the file."""
        self._lengths.append(tokens)

    def flush(self) -> tuple[int, str]:
        """Return the size of the token file, and the digest of what was added since the last call."""
        self._file.flush()
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return self._file.tell(), digest

    def close(self) -> None:
        """Write the index, without which the token file cannot be read."""
        self._file.close()
        write_index(Path(f"{self._prefix}.idx"), np.frombuffer(self._lengths, np.int32), self._dtype)
