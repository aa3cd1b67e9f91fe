"""The same rows as a file of every format and compression."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from btm_scale.config.data import DomainConfig
from btm_scale.data.documents import BadLines, Document, read_documents
from btm_scale.data.sources import resolve_domain

Rows = Sequence[Mapping[str, Any]]


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_array(rows: Rows) -> bytes:
    return json.dumps(list(rows), indent=1).encode()


def json_objects(rows: Rows) -> bytes:
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


def table(rows: Rows, delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: Rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=50)
    return sink.getvalue().to_pybytes()


def arrow_stream(rows: Rows) -> bytes:
    return _arrow(rows, pa.ipc.new_stream)


def arrow_file(rows: Rows) -> bytes:
    return _arrow(rows, pa.ipc.new_file)


def _arrow(rows: Rows, new: Callable[..., Any]) -> bytes:
    sink = pa.BufferOutputStream()
    contents = pa.Table.from_pylist(list(rows))
    with new(sink, contents.schema) as writer:
        writer.write_table(contents, max_chunksize=40)
    return sink.getvalue().to_pybytes()


def tar(rows: Rows, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A sample per row: its text as .txt, its other fields as .json, and an image that no text reader needs."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as archive:
        for i, row in enumerate(rows):
            others = {name: value for name, value in row.items() if name != "text"}
            members = {"jpg": b"\xff\xd8" * 300, "json": json.dumps(others).encode(), "txt": row["text"].encode()}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"shard/{i:06d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def in_two_members(compress: Callable[[bytes], bytes], content: bytes) -> bytes:
    """Two compressed streams in one file; the first ends within a line."""
    return compress(content[: len(content) // 3]) + compress(content[len(content) // 3 :])


def long_window(content: bytes) -> bytes:
    """As `zstd --long=28`: a window beyond what decompressors accept by default."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


FILES: dict[str, Callable[[Rows], bytes]] = {
    "rows.jsonl": json_lines,
    "rows.json.gz": lambda rows: gzip.compress(json_lines(rows)),
    "rows.csv": table,
    "semicolons.csv": lambda rows: b"\xef\xbb\xbf" + table(rows, ";"),
    "rows.tsv": lambda rows: table(rows, "\t"),
    "part-00000": json_lines,
    "part-00001": parquet,
    "part-00002": table,
    "rows.jsonl-00000-of-00012": lambda rows: lzma.compress(json_lines(rows)),
    "rows.parquet": parquet,
    "rows.arrow": arrow_stream,
    "file.arrow": arrow_file,
    "rows.tar": tar,
    "gnu.tar.gz": lambda rows: gzip.compress(tar(rows, tarfile.GNU_FORMAT)),
    "array.json": json_array,
    "array.jsonl": json_array,
    "objects.json": json_objects,
    "rows.jsonl.xz": lambda rows: in_two_members(lzma.compress, json_lines(rows)) + bytes(8),
    "rows.jsonl.bz2": lambda rows: in_two_members(bz2.compress, json_lines(rows)),
    "members.jsonl.gz": lambda rows: in_two_members(gzip.compress, json_lines(rows)),
    "long.jsonl.zst": lambda rows: in_two_members(long_window, json_lines(rows)),
}


def read(root: Path, bad_lines: BadLines | None = None, **domain: Any) -> list[Document]:
    """Return the documents of a domain below a folder."""
    source = resolve_domain("d", DomainConfig.model_validate(domain), root)
    return list(read_documents(source, bad_lines or BadLines()))


def texts(root: Path, **domain: Any) -> list[str]:
    """Return the texts of a domain's documents."""
    return [document.text for document in read(root, **domain)]
