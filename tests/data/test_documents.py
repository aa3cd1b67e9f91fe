"""Documents from every format, and an error for every line without a valid text."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from btm_scale.config.data import DomainConfig
from btm_scale.data.documents import BadLines, Document, read_documents
from btm_scale.data.formats import plain_text
from btm_scale.data.sources import resolve_domain
from btm_scale.errors import DataError

TEXTS = ["first\n  text\twith tabs", "zweiter — mit Umlaut ü", "最後 🎉"]


def read(root: Path, bad_lines: BadLines | None = None, **domain: Any) -> list[Document]:
    source = resolve_domain("d", DomainConfig.model_validate(domain), root)
    return list(read_documents(source, bad_lines or BadLines()))


def texts(root: Path, **domain: Any) -> list[str]:
    return [document.text for document in read(root, **domain)]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_same_documents_come_from_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [{"body": text, "n": i} for i, text in enumerate(TEXTS)]
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=2)
    contents = {"rows.jsonl": jsonl(rows), "rows.parquet": table.getvalue().to_pybytes()}
    for name, content in contents.items():
        (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](content))
        assert texts(tmp_path, text=name + suffix, field="body") == TEXTS
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.md{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    assert texts(tmp_path, text=f"*.md{suffix}") == TEXTS


def test_several_compressed_streams_in_one_file_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        parts = [COMPRESS[suffix](jsonl([{"text": text}])) for text in TEXTS]
        (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(parts))
        assert texts(tmp_path, text=f"a.jsonl{suffix}") == TEXTS


def test_a_long_plain_file_is_cut_at_blank_lines_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "PLAIN_DOCUMENT_BYTES", 1000)
    paragraph = "line of text ü\n" * 5 + "\n"
    content = paragraph * 60 + "ü" * 5000 + "\n" + "without blank lines\n" * 300
    (tmp_path / "long.txt").write_text(content, encoding="utf-8")
    parts = texts(tmp_path, text="long.txt")
    assert "".join(parts) == content
    assert max(len(part.encode()) for part in parts) < 3100
    assert parts[0].endswith("\n\n")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(lines: int) -> int:
        line = jsonl([{"text": "x" * 5_000}])
        with gzip.open(tmp_path / "big.jsonl.gz", "wb", compresslevel=1) as file:
            for _ in range(lines):
                file.write(line)
        source = resolve_domain("d", DomainConfig(text=("big.jsonl.gz",)), tmp_path)
        tracemalloc.start()
        for _ in read_documents(source, BadLines()):
            pass
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(4_000) < peak(400) + 200_000  # 20 MB against 2 MB


BAD_LINES = {
    b'{"text": "\xff"}\n': "not UTF-8 text (invalid start byte at byte 10)",
    b'{"text": "a"\n': "not valid JSON (Expecting ',' delimiter",
    b"[1]\n": "expected a JSON object, found list",
    b'{"body": "a"}\n': "no field 'text'; fields are 'body'",
    b'{"text": 3}\n': "field 'text' holds a number, not text",
    b'{"text": "\\ud800"}\n': "field 'text' holds half a surrogate pair",
    b'{"text": ' + b"[" * 100_000 + b"\n": "nested too deeply",
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_malformed_line_is_reported_or_skipped_and_counted(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + bad + b'{"text": "also good"}\n')
    with pytest.raises(DataError) as caught:
        read(tmp_path, text="a.jsonl")
    assert f"{tmp_path / 'a.jsonl'}, line 3: {BAD_LINES[bad]}" in str(caught.value)
    assert "data.on_bad_line" in str(caught.value)
    bad_lines = BadLines("skip")
    assert [document.text for document in read(tmp_path, bad_lines, text="a.jsonl")] == ["good", "also good"]
    assert bad_lines.skipped == 1


def test_the_first_remedy_for_a_missing_field_is_to_name_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a", "id": 1}\n')
    with pytest.raises(DataError, match=r"fields are 'body', 'id'\. Set `field` of the domain to one of them, fix the"):
        read(tmp_path, text="a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"{}\n")
    with pytest.raises(DataError, match=r"fields are none\. Fix the line, or set data\.on_bad_line to skip"):
        read(tmp_path, text="b.jsonl")


def test_an_undecodable_line_of_plain_text_and_a_binary_file_are_errors(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("one\ncaf\xe9\nthree\n".encode("latin-1"))
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0\n" * 10)
    with pytest.raises(DataError, match=r"latin.txt, line 2: not UTF-8 at byte 3 of the line"):
        read(tmp_path, text="latin.txt")
    with pytest.raises(DataError, match=r"image.txt, line 1: a NUL byte: the file is binary"):
        read(tmp_path, text="image.txt")
    bad_lines = BadLines("skip")
    assert [document.text for document in read(tmp_path, bad_lines, text="latin.txt")] == ["one\nthree\n"]
    assert bad_lines.skipped == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_reported_with_the_line_of_the_damage(tmp_path: Path, suffix: str) -> None:
    content = jsonl([{"text": f"{i} " + "".join(chr(97 + i * j % 26) for j in range(3000))} for i in range(500)])
    packed = COMPRESS[suffix](content)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a.jsonl.*, line \d+: "):
        read(tmp_path, text=f"a.jsonl{suffix}")
    (tmp_path / f"b.jsonl{suffix}").write_bytes(b"this is not compressed at all")
    with pytest.raises(DataError, match=r"line 1: the file is damaged from here on"):
        read(tmp_path, text=f"b.jsonl{suffix}")


def test_parquet_reports_a_missing_column_a_null_and_an_invalid_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 2: field 'text' holds null, not text"):
        read(tmp_path, text="a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has no column 'body', only text. Set the domain's field"):
        read(tmp_path, text="a.parquet", field="body")
    with pytest.raises(DataError, match=r"b.parquet, row 1: the file is damaged"):
        read(tmp_path, text="b.parquet")


def test_split_keys_come_from_a_field_up_to_a_separator_or_from_the_file(tmp_path: Path) -> None:
    rows = [{"text": "a", "source": "book#1"}, {"text": "b", "source": "book#2"}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_bytes(jsonl(rows[:2]))
    split_keys = [
        document.split_key for document in read(tmp_path, text="a.jsonl", split_by={"field": "source", "until": "#"})
    ]
    assert split_keys == ["book", "book"]
    assert [document.split_key for document in read(tmp_path, text="a.jsonl", split_by="file")] == ["a.jsonl"] * 2
    assert [document.split_key for document in read(tmp_path, text="a.jsonl")] == [None, None]
    (tmp_path / "b.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(DataError, match=r"line 3: no field 'source'; fields are 'text'\. Set `split_by\.field`"):
        read(tmp_path, text="b.jsonl", split_by={"field": "source"})


def test_whitespace_is_not_a_document_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl([{"text": "a"}, {"text": " \n"}, {"text": ""}]))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\r\n")
    assert texts(tmp_path, text=["a.jsonl", "b.txt"]) == ["a", "b\r\n"]
