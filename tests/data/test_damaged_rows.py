"""Rows and files that are bad, damaged or very large: reported with their place, skipped, or read in bounded memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from helpers.row_formats import json_lines, read, table, tar, texts
from helpers.text_samples import MakeConfig, prose_texts

from btm_scale.config.data import DomainConfig
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.files import SourceFile
from btm_scale.data.formats.compression import BROKEN_STREAM, open_uncompressed
from btm_scale.data.formats.sense import format_of
from btm_scale.data.prepare import prepare
from btm_scale.data.sources import resolve_domain
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir

TEXTS = ["first\n  text", "zweiter, — mit; Umlaut ü", "x" * 300_000]
ROWS = [{"text": text} for text in TEXTS]

BAD_ROWS = {
    "a.csv": (b'text,n\na,1\nb\n"c"d,3\n"\xff",4\nlast,5\n', 3, "line 3: the row has 1 cells, and the header has 2"),
    "a.json": (b'[{"text": "a"}, 3, {"text": 4}, {"text": "last"}]', 2, "value 2: expected a JSON object, found int"),
    "open.csv": (b'text,n\na,1\nlast,2\n"open,3\n' + b"x,y\n" * 9, 1, "line 4: unexpected end of data"),
    "cut.json": (b'[{"text": "a"}, {"text": "last"}, {"te', 1, "value 3: the file is damaged from here on"),
    "more.json": (b'[{"text": "a"}, {"text": "last"}] {}', 1, "value 3: the file continues after the end"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_reported_with_its_place_or_skipped(tmp_path: Path, name: str) -> None:
    content, skipped, message = BAD_ROWS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(tmp_path, text=name)
    assert message in str(raised.value)
    bad_lines = BadLines("skip")
    assert [document.text for document in read(tmp_path, bad_lines, text=name)] == ["a", "last"]
    assert bad_lines.skipped == skipped


def test_a_bad_sample_of_a_tar_is_named(tmp_path: Path) -> None:
    sink = io.BytesIO()
    members = {"a.txt": b"good", "b.json": b"{", "b.txt": b"x", "c.json": b"{}", "d.json": b'{"text": "too"}'}
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    bad_lines = BadLines("skip")
    assert [document.text for document in read(tmp_path, bad_lines, text="a.tar")] == ["good", "too"]
    assert bad_lines.losses["a.tar"].first.startswith("sample 2: b.json: not valid JSON")
    (tmp_path / "cut.tar").write_bytes(sink.getvalue()[:700])
    with pytest.raises(DataError, match=r"sample 1: the file is damaged"):
        read(tmp_path, text="cut.tar")


def test_a_file_that_only_its_name_says_is_compressed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("words")
    with pytest.raises(DataError, match=r"its name ends in \.gz, and its content is not compressed"):
        read(tmp_path, text="a.txt.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(json_lines(ROWS))  # a browser unpacked it, and kept the name
    assert texts(tmp_path, text="b.jsonl.gz") == TEXTS
    (tmp_path / "c.txt").write_bytes(gzip.compress(b"words"))
    assert texts(tmp_path, text="c.txt") == ["words"]


def test_a_zstd_file_that_was_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    frames = zstandard.ZstdCompressor(write_checksum=True)
    skippable = b"\x50\x2a\x4d\x18\x05\0\0\0hello"
    packed = skippable + frames.compress(b"") + frames.compress("\n".join(prose_texts(50)).encode())
    file = tmp_path / "a.txt.zst"
    file.write_bytes(packed)
    [whole] = texts(tmp_path, text=file.name)
    assert whole == "\n".join(prose_texts(50))
    for cut in [*range(len(skippable) + 1, len(skippable) + 9), len(packed) - 5, len(packed) - 4, len(packed) - 1]:
        file.write_bytes(packed[:cut])
        with pytest.raises(DataError, match=r"a\.txt\.zst, line 1: the file is damaged from here on"):
            texts(tmp_path, text=file.name)


def test_skipping_names_each_file_and_what_it_loses(
    tmp_path: Path, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    lines = json_lines([{"text": f"{i} {text}"} for i, text in enumerate(prose_texts(300))])
    (tmp_path / "ok.jsonl").write_bytes(lines)
    (tmp_path / "two.jsonl").write_bytes(b"bad\n" + lines.replace(b'{"text": "1', b'{"text": "second 1') + b"bad\n")
    packed = gzip.compress(lines.replace(b'{"text": "', b'{"text": "third '))
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    config = make_config(tmp_path, {"d": {"text": "*.jsonl*"}}, data={"on_bad_line": "skip"})
    fingerprint = prepare(config, RunDir(tmp_path / "run"))["d"]
    assert set(fingerprint.skipped) == {"two.jsonl", "cut.jsonl.gz"}
    assert fingerprint.skipped["two.jsonl"].startswith("2 bad lines, the first: line 1: not valid JSON")
    assert "is lost; " in fingerprint.skipped["cut.jsonl.gz"]
    assert "Domain 'd': skipped in cut.jsonl.gz: 1 bad line" in caplog.text
    (tmp_path / "wrong.jsonl").write_bytes(b"x" + packed)
    with pytest.raises(DataError, match=r"Nothing was read of .*wrong\.jsonl: \d+ bad lines?, the first: line 1: "):
        prepare(config, RunDir(tmp_path / "other"))


@pytest.mark.parametrize("library", [gzip, bz2], ids=["gzip", "bz2"])
def test_no_line_before_damage_is_lost_that_the_standard_library_reads(library: Any, tmp_path: Path) -> None:
    def lines(opened: Any) -> tuple[list[bytes], type[Exception] | None]:
        read: list[bytes] = []
        try:
            with opened as stream:
                read.extend(iter(stream.readline, b""))
        except BROKEN_STREAM as error:
            return read, type(error)
        return read, None

    packed = library.compress(json_lines([{"text": f"{i} {text}"} for i, text in enumerate(prose_texts(3_000))]))
    draw = random.Random(1)
    for number in range(40):
        damaged, place = bytearray(packed), draw.randrange(20, len(packed))
        if number % 2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << draw.randrange(8)
        (tmp_path / "file").write_bytes(damaged)
        assert lines(open_uncompressed(tmp_path / "file")) == lines(library.open(tmp_path / "file"))


HUGE: dict[str, Callable[[int], bytes]] = {
    "a.json": lambda count: b"[" + b",\n".join([b'{"text": "%s"}' % (b"x" * 5_000)] * count) + b"]",
    "a.csv": lambda count: b"text,n\n" + (b'"%s",1\n' % ((b"x" * 49 + b"\n") * 100)) * count,
    "a.tar": lambda count: tar([{"text": "x" * 5_000}] * count),
}


@pytest.mark.parametrize("name", HUGE)
def test_memory_does_not_grow_with_a_file_of_any_format(tmp_path: Path, name: str) -> None:
    def peak(count: int) -> int:
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(HUGE[name](count), preset=0))
        source = resolve_domain("d", DomainConfig(text=(f"{name}.xz",)), tmp_path)
        tracemalloc.start()
        assert sum(1 for _ in read_documents(source, BadLines())) == count
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(10)  # imports
    assert peak(1_500) < peak(300) + 2_000_000  # 7.5 MB against 1.5 MB


def test_hostile_rows_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 32
    bombs = {
        "deep.json": b'[{"text": ' + b"[" * 2_000_000,
        "open.csv": b"text,n\n1,2\n" + b'"' + b"x\n" * 1_000_000,
        "cells.csv": b"text,n\n1,2\n" + b"," * 20_000_000,
        "pax.tar": pax.tobuf(tarfile.USTAR_FORMAT) + bytes(100_000),
    }
    for name, content in bombs.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        tracemalloc.start()
        with pytest.raises(DataError, match=rf"{name}\.gz, "):
            read(tmp_path, text=f"{name}.gz")
        assert tracemalloc.get_traced_memory()[1] < 200_000_000, name
        tracemalloc.stop()


def test_a_broken_first_line_of_json_lines_does_not_change_the_format(tmp_path: Path) -> None:
    content = b'{"text": "a\n' + json_lines(ROWS)
    for name in ("a.jsonl", "part-0"):
        (tmp_path / name).write_bytes(content)
        assert format_of(SourceFile(tmp_path / name, name), DomainConfig(text=(name,))) == "jsonl"


def test_a_column_that_is_missing_lists_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(table([{"id": 1, "body": "x"}]))
    with pytest.raises(DataError, match=r"has no column 'text', only 'id', 'body'\. Set the domain's field"):
        texts(tmp_path, text="a.csv")


def test_a_table_without_a_header_is_read_once_it_has_the_one_that_the_message_asks_for(tmp_path: Path) -> None:
    rows = b"7\tfirst text\n8\tsecond text\n"
    (tmp_path / "a.tsv").write_bytes(rows)
    with pytest.raises(DataError, match="write the names of the columns above the first row if they are missing"):
        texts(tmp_path, text="a.tsv")
    (tmp_path / "a.tsv").write_bytes(b"id\ttext\n" + rows)
    assert texts(tmp_path, text="a.tsv") == ["first text", "second text"]
