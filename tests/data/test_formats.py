"""The format of a file is what its first bytes show, or what its domain says; everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.row_formats import FILES, json_lines, parquet, read, table, texts
from helpers.text_samples import MakeConfig, prose_texts

from btm_scale.data.documents import BadLines
from btm_scale.data.prepare import prepare
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS, RunDir

TEXTS = ['first\n  text\twith "quotes"', "zweiter, — mit; Umlaut ü", "最後 🎉 \\ {[", "x" * 300_000]
ROWS = [{"id": i, "text": text, "quality": i} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", FILES)
def test_rows_are_read_from_every_format_whatever_the_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    assert texts(tmp_path, text=name) == TEXTS
    assert texts(tmp_path, text=name, filter={"field": "quality", "min": 1, "max": 2}) == TEXTS[1:3]
    keys = [document.split_key for document in read(tmp_path, text=name, split_by={"field": "id"})]
    assert keys == ["0", "1", "2", "3"]
    if name == "part-00002":  # only the header shows that it is a table
        (tmp_path / name).rename(tmp_path / (name := "part-00002.csv"))
    with pytest.raises(DataError, match=name):
        texts(tmp_path, text=name, field="body")


def test_the_same_rows_give_the_same_token_files_in_every_format(tmp_path: Path, make_config: MakeConfig) -> None:
    rows = [{"id": i, "text": f"{i}\n{text}"} for i, text in enumerate(prose_texts(300) * 4)]
    for name, write in FILES.items():
        (tmp_path / name).write_bytes(write(rows))
    domains = {f"domain{i}": {"text": name} for i, name in enumerate(FILES)}
    run = RunDir(tmp_path / "run")
    fingerprints = prepare(make_config(tmp_path, domains), run)
    assert sum(counts.documents for counts in fingerprints["domain0"].splits.values()) == 1200
    for domain in domains:
        assert fingerprints[domain].text == fingerprints["domain0"].text
        for split in SPLITS:
            for suffix in (".bin", ".idx"):
                ours = run.tokens(domain, split).with_suffix(suffix).read_bytes()
                assert ours == run.tokens("domain0", split).with_suffix(suffix).read_bytes(), (domain, split)


WRONG = [
    ("rows.jsonl", "csv", "holds JSON lines, and `format: csv`"),
    ("rows.jsonl", "parquet", "holds JSON lines, and `format: parquet`"),
    ("rows.csv", "jsonl", "line 1: not valid JSON"),
    ("rows.csv", "tsv", "has no column 'text'"),
    ("rows.csv", "arrow", "is not Arrow, which `format: arrow` asks for"),
    ("rows.csv", "webdataset", "sample 1: the file is damaged"),
    ("rows.tsv", "json", "value 1: expected a JSON object"),
    ("rows.parquet", "jsonl", "holds Parquet, and `format: jsonl`"),
    ("rows.parquet", "text", "holds Parquet, and `format: text`"),
    ("rows.arrow", "parquet", "holds Arrow, and `format: parquet`"),
    ("rows.tar", "text", "holds a tar, and `format: text`"),
    ("array.json", "jsonl", "Set it to json, or remove it"),
]


@pytest.mark.parametrize(("name", "format", "message"), WRONG)
def test_a_wrong_format_is_refused(tmp_path: Path, name: str, format: str, message: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    for policy in ("error", "skip"):
        with pytest.raises(DataError) as raised:
            read(tmp_path, BadLines(policy), text=name, format=format)  # type: ignore[arg-type]
        assert message in str(raised.value)


def test_a_named_format_reads_what_the_bytes_do_not_show(tmp_path: Path) -> None:
    (tmp_path / "markup.json").write_bytes(json_lines(ROWS[:1]))
    assert texts(tmp_path, text="markup.json", format="text") == [json_lines(ROWS[:1]).decode()]
    (tmp_path / "column").write_bytes(b"text\r\none\r\ntwo\r\n")
    assert texts(tmp_path, text="column", format="csv") == ["one", "two"]
    assert texts(tmp_path, text="column") == ["text\r\none\r\ntwo\r\n"]


def test_cells_that_other_readers_take_for_missing_are_text(tmp_path: Path) -> None:
    cells = ["null", "NA", "NaN", "None", "n/a"]
    (tmp_path / "rows.csv").write_bytes(table([{"id": cell, "text": cell} for cell in cells]))
    assert texts(tmp_path, text="rows.csv") == cells


def test_other_fields_may_change_their_type_from_row_to_row(tmp_path: Path) -> None:
    rows = [{"text": "one", "n": 1}, {"text": "two", "n": "2"}, {"text": "three", "n": None}, {"text": "four"}]
    (tmp_path / "rows.jsonl").write_bytes(json_lines(rows))
    assert texts(tmp_path, text="rows.jsonl") == ["one", "two", "three", "four"]


LONG_TABLES = {
    "cut in a later row": [{"id": str(i), "text": f'{i} "quoted",\nand more\n' * 40} for i in range(200)],
    "cut in the first row": [{"id": str(i), "text": "a line\n" * 20_000} for i in range(2)],
    "cut in a long line": [{"id": str(i), "text": "ü" * 70_000} for i in range(2)],
    "unusual line separators": [{"id": str(i), "text": "one\u2028two\x0bthree"} for i in range(3)],
}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("rows", LONG_TABLES.values(), ids=LONG_TABLES)
def test_a_table_without_a_suffix_is_recognized_wherever_its_first_bytes_end(
    tmp_path: Path, rows: list[dict[str, str]], delimiter: str
) -> None:
    (tmp_path / "part-00000").write_bytes(table(rows, delimiter))
    assert texts(tmp_path, text="part-00000") == [row["text"] for row in rows]
    (tmp_path / "part-00000").write_bytes(table(rows, delimiter).removesuffix(b"\r\n"))
    assert texts(tmp_path, text="part-00000") == [row["text"] for row in rows]


PLAIN = {
    "prose.txt": "text, images and sounds are data\nand so on, and so on, and so on\n",
    "code.py": "{x for x in y}\n",
    "latex.tex": "{\\bf text}\n[{\\it x}]\n",
    "list.md": '[1] a reference\n["x"]\n',
    "json.md": 'First some words, then\n{"text": "x"}\n',
    "brace.txt": "{\n",
    "table.md": "text, more\n1, 2\n",
    "long.txt": "text,more\n" + "a line, and another, and one more\n" * 3_000,
    "quoted.txt": "text,more\n" + 'a line, "as they say", and so forth\n' * 3_000,
}


@pytest.mark.parametrize("name", PLAIN)
def test_prose_and_code_are_plain_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(PLAIN[name])
    assert texts(tmp_path, text=name) == [PLAIN[name]]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"5" * 64 + b"\nsize 1048576\n"
UNREADABLE = {
    "utf16.txt": ("häuser".encode("utf-16"), "is UTF-16 text"),
    "archive.zip": (b"PK\x03\x04" + bytes(50), "is a zip archive, which is not read"),
    "a.jsonl.lz4": (b"\x04\x22\x4d\x18" + bytes(50), "is compressed with LZ4"),
    "paper.pdf": (b"%PDF-1.5\n\xff\xff\0", "is a PDF"),
    "table.orc": (b"ORC\0\xff", "is an ORC table"),
    "a.jsonl.snappy": (b"\xff\x06\x00\x00sNaPpY" + bytes(50), "is compressed with Snappy"),
    "book.txt": (LFS_POINTER, r"is a Git LFS pointer, .*git lfs pull"),
    "rows.parquet": (LFS_POINTER, "is a Git LFS pointer"),
    "rows.jsonl.gz": (LFS_POINTER, "is a Git LFS pointer"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_format_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, BadLines("skip"), text=name)
    (tmp_path / "orchids.txt").write_text("ORCHIDS and %PDF- are words")
    assert texts(tmp_path, text="orchids.txt") == ["ORCHIDS and %PDF- are words"]


def test_rows_under_a_name_of_text_say_how_to_read_them_as_text(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text(json.dumps({"name": "x", "version": "1"}, indent=2))
    with pytest.raises(DataError, match=r"fields are 'name', 'version'\. Set `field` .*, set its `format` to text"):
        texts(tmp_path, text="package.json")


def test_a_binary_column_of_utf8_is_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"one", "zwölf".encode()], pa.binary())}), tmp_path / "a.parquet")
    assert texts(tmp_path, text="a.parquet") == ["one", "zwölf"]
    pq.write_table(pa.table({"text": pa.array([b"one", b"\xff"], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 2: field 'text' holds bytes that are not UTF-8 \(byte 0\)"):
        texts(tmp_path, text="a.parquet")


def test_objects_on_one_line_are_read_with_the_format_that_the_message_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}{"text": "two"}\n')
    with pytest.raises(DataError, match=r"line 1: .*Set the domain's `format` to json if a line holds several"):
        texts(tmp_path, text="a.jsonl")
    assert texts(tmp_path, text="a.jsonl", format="json") == ["one", "two"]


def test_a_header_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,n\xffme\none,1\n")
    with pytest.raises(DataError, match=r"line 1: not UTF-8 at byte 6 of the line\. The first row must name"):
        texts(tmp_path, text="a.csv")


def test_a_table_with_carriage_returns_alone_is_refused_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,x\rone,1\rtwo,2\r")
    with pytest.raises(DataError, match=r"its lines end with a carriage return alone.* tr '.r' '.n'\.$"):
        texts(tmp_path, text="a.csv")


def test_fields_are_nested_joined_and_lists(tmp_path: Path) -> None:
    rows = [
        {"meta": {"title": "A", "src": {"id": 1}}, "body": ["one", "two"], "lang": "en", "a.b": "dot"},
        {"meta": {"title": None, "src": {"id": 2}}, "body": ["three"], "lang": "de", "a.b": "dot"},
    ]
    for name, content in {"a.jsonl": json_lines(rows), "a.parquet": parquet(rows)}.items():
        (tmp_path / name).write_bytes(content)
        joined = texts(tmp_path, text=name, field=["meta.title", "body"])
        assert joined == ["A\n\none\ntwo", "three"]
        assert texts(tmp_path, text=name, field="a.b") == ["dot", "dot"]
        assert texts(tmp_path, text=name, field="body", filter={"field": "lang", "one_of": ["de"]}) == ["three"]
        by_source = read(tmp_path, text=name, field="body", split_by={"field": "meta.src.id"})
        assert [document.split_key for document in by_source] == ["1", "2"]
        with pytest.raises(DataError, match=r"no field 'meta\.author'|no column 'meta\.author'"):
            texts(tmp_path, text=name, field="meta.author")
        with pytest.raises(DataError, match=r"field 'lang', which filter compares, is not a number: 'en'"):
            texts(tmp_path, text=name, field="body", filter={"field": "lang", "min": 4})


def test_a_filter_that_excludes_everything_is_reported_as_such(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(ROWS))
    domain = {"text": "a.jsonl", "filter": {"field": "quality", "min": 99}}
    with pytest.raises(DataError, match=r"hold no document that meets its filter. Add text, change the filter"):
        prepare(make_config(tmp_path, {"d": domain}), RunDir(tmp_path / "run"))
