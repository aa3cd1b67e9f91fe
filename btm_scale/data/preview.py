"""Preview the first documents of each domain, so that format errors are reported before anything is written."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import zstandard

from btm_scale.config.run import RunConfig
from btm_scale.data.chat.check import require_renderable
from btm_scale.data.chat.template import template_of
from btm_scale.data.documents import BadLines, empty_domain, read_documents, read_file_of
from btm_scale.data.enough import needed_splits, too_small
from btm_scale.data.existing_tokens import other_tokenizer
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.compression import NotCompressedError, compression_of
from btm_scale.data.formats.indexed_tokens import IndexedTokens
from btm_scale.data.formats.rows import Fields
from btm_scale.data.formats.sense import format_of
from btm_scale.data.sources import DomainSource
from btm_scale.data.splits import placement_of
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS
from btm_scale.util.bounded_json import parse_json

_READ_BYTES = 1 << 20  # of a domain's text; a smaller domain is read completely
_LEAST_DOCUMENTS = 3
_OTHER_FILES = 16  # whose first document is read too
_BAD_LINES = 10_000  # without a document before them
_SAMPLE_BYTES = 1 << 18
_COMPRESSION = 3.0  # of text in a file whose header does not have the uncompressed size


@dataclass(frozen=True)
class Preview:
    """The size of a domain's text in bytes and tokens: estimates, unless the domain is small."""

    text_bytes: int
    tokens: int
    problem: str = ""  # one that is likely, but not certain before the text is encoded


def preview_texts(sources: Sequence[DomainSource], config: RunConfig, vocabulary: int) -> dict[str, Preview]:
    """Return a preview of every domain. Raises one DataError with the problems of all domains."""
    previews, problems = {}, []
    for source in sources:
        try:
            previews[source.name] = preview_text(source, config, vocabulary)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return previews


def preview_text(source: DomainSource, config: RunConfig, vocabulary: int) -> Preview:
    """Read the first documents of a domain: about 1 MB, and one document of each of a few other files.

    Raises DataError if a document cannot be read, or if the domain is empty or certainly too small to split.
    """
    bad_lines = _FirstLines(config.data.on_bad_line)
    enough = min(_READ_BYTES, source.settings.max_bytes or _READ_BYTES)
    size = documents = 0
    last = first = None
    try:
        for number, file in enumerate(source.files):
            for document in read_file_of(source, file, bad_lines):
                size += len(document.text.encode())
                documents += 1
                first = first or document
                if size >= enough and documents >= _LEAST_DOCUMENTS:
                    last = number
                    break
            if last is not None:
                break
    except _NoDocumentError:
        raise DataError(
            f"Domain '{source.name}': none of its first {_BAD_LINES:,} lines holds a document. Check its files, or its "
            "field."
        ) from None
    per_token = bytes_per_token(vocabulary)
    if last is None:
        if not documents:
            raise empty_domain(source, bad_lines)
        total = _require_enough(source, config, per_token)
    else:
        for file in _others(source.files[last + 1 :]):
            next(read_file_of(source, file, bad_lines), None)
        total = round(sum(_text_bytes(file, source, per_token) for file in source.files))
    if source.settings.chat is not None and first is not None:
        template_of(source, source.tokenizer)
        if config.data.on_bad_line == "error":
            require_renderable(source, first)
    if source.settings.max_bytes is not None:
        total = min(total, source.settings.max_bytes)
    tokens = round(total / per_token)
    return Preview(total, tokens, _likely_problem(source, config, tokens) or _other_tokenizer(source))


def bytes_per_token(vocabulary: int) -> float:
    """Return how many bytes of text a token of a vocabulary has, about: 2.4 of 1,024 tokens, 3.2 of 4,096.

    Fitted to English prose, law and mathematics under the tokenizers that a run trains.
    """
    return min(4.5, max(1.5, 0.36 * math.log2(vocabulary) - 1.15))


class _NoDocumentError(Exception):
    """Too many bad lines."""


class _FirstLines(BadLines):
    """The policy for bad lines, up to a number of skipped lines."""

    def __call__(
        self, file: SourceFile, line: int, why: str, remedy: str = "", *, unit: str = "line", damaged: bool = False
    ) -> None:
        super().__call__(file, line, why, remedy, unit=unit, damaged=damaged)
        if self.skipped > _BAD_LINES:
            raise _NoDocumentError


def _require_enough(source: DomainSource, config: RunConfig, per_token: float) -> int:
    """Return the bytes of a small domain's text.

    Raises DataError if a split is too small even with one token per byte, and one for the end of each document.
    """
    splits = needed_splits(source, config)
    documents, sizes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    placement = placement_of(source, config.data, splits)
    for _, identity in placement.placed(read_documents(source, BadLines(config.data.on_bad_line))):
        documents[identity.split] += 1
        sizes[identity.split] += identity.bytes
    needed = config.budget.sequence_length + 1
    total = sum(sizes.values())
    # A chat template may add more tokens than a conversation has bytes.
    is_short = source.settings.chat is None and any(sizes[split] + documents[split] < needed for split in splits)
    if is_short:
        counts = ", ".join(f"{split} has {documents[split]} documents with {sizes[split]} bytes" for split in splits)
        raise too_small(source, config, counts, 0.7 * total / per_token)
    return total


def _likely_problem(source: DomainSource, config: RunConfig, tokens: int) -> str:
    data, needed = config.data, config.budget.sequence_length + 1
    smallest = min(data.dev, data.test) * tokens
    if smallest >= needed:
        return ""
    return (
        f"Domain '{source.name}' may be too small: its dev or test split has about {round(smallest):,} tokens, and "
        f"needs {needed:,} (budget.sequence_length + 1). Add text, or raise data.dev and data.test."
    )


def _other_tokenizer(source: DomainSource) -> str:
    """Return a sentence if the first token files of a domain are probably of another tokenizer; "" if not."""
    if not source.settings.token_files or source.tokenizer is None:
        return ""
    first = next(file.path for file in source.files if file.path.suffix == ".bin")
    return other_tokenizer(first, source.tokenizer)


def _others(files: Sequence[SourceFile]) -> list[SourceFile]:
    return list(files[:: max(1, len(files) // _OTHER_FILES)])[:_OTHER_FILES]


def _text_bytes(file: SourceFile, source: DomainSource, per_token: float) -> float:
    """Estimate the bytes of text in a file, from its header and its first rows."""
    if source.settings.token_files:
        return per_token * IndexedTokens(file.path).tokens if file.path.suffix == ".bin" else 0.0
    try:
        format = format_of(file, source.settings)
    except NotCompressedError:
        return file.stat().st_size
    if format == "parquet" and not file.compressed:
        return float(_column_bytes(file, source.settings.fields))
    size = float(_uncompressed_bytes(file))
    if format == "jsonl":
        size *= _share_of_text(file, source)
    return size


def _column_bytes(file: SourceFile, fields: Sequence[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.open_seekable() as stream, pq.ParquetFile(stream) as table:
            metadata = table.metadata
    except (OSError, pa.ArrowException):
        return file.stat().st_size
    columns = [
        metadata.row_group(group).column(number)
        for group in range(metadata.num_row_groups)
        for number in range(metadata.num_columns)
    ]
    return sum(
        column.total_uncompressed_size
        for column in columns
        if any(f"{column.path_in_schema}.".startswith(f"{field}.") for field in fields)
    )


def _uncompressed_bytes(file: SourceFile) -> float:
    size = file.stat().st_size
    with file.path.open("rb") as stream:
        head = stream.read(18)
        compression = compression_of(head, file.path)
        if compression is None:
            return size
        recorded = 0
        if compression == "gzip" and size < 1 << 28:
            stream.seek(-min(4, size), 2)  # the last 4 bytes have the size of the last member, modulo 4 GiB
            recorded = int.from_bytes(stream.read(4), "little")
        elif compression == "zstd":
            with contextlib.suppress(zstandard.ZstdError):
                recorded = zstandard.get_frame_parameters(head).content_size
    return recorded if recorded >= size else _COMPRESSION * size


def _share_of_text(file: SourceFile, source: DomainSource) -> float:
    """Return the text's fraction of the bytes of the first complete rows."""
    with file.open() as stream:
        lines = stream.read(_SAMPLE_BYTES).split(b"\n")[:-1]
    fields = Fields(source.settings)
    text = 0
    for line in lines:
        with contextlib.suppress(ValueError):
            row = parse_json(line, unique_keys=False, unicode=False)
            if isinstance(row, dict) and (values := fields(row)) is not None:
                text += len(values[0].encode())
    return text / sum(len(line) + 1 for line in lines) if text else 1.0
