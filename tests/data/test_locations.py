"""Where text is: data sets that `datasets` saved, the Hugging Face cache, and remote stores."""

from __future__ import annotations

import functools
import gzip
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from fsspec.implementations.memory import MemoryFile

from btm_scale.config.data import DomainConfig
from btm_scale.data.documents import BadLines, read_documents
from btm_scale.data.sources import resolve_domain
from btm_scale.errors import DataError

TEXTS = [f"text {i}" for i in range(10)]


def texts(root: Path, *names: str) -> list[str]:
    source = resolve_domain("d", DomainConfig(text=names), root)
    return [document.text for document in read_documents(source, BadLines())]


def test_a_folder_of_save_to_disk_is_its_rows(tmp_path: Path) -> None:
    rows = Dataset(pa.table({"text": TEXTS, "id": list(range(10))}))
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    assert texts(tmp_path, "saved") == TEXTS
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "dict")
    with pytest.raises(DataError, match=r"is a DatasetDict\. .* name a split, 'dict/train'.*'dict/test'"):
        texts(tmp_path, "dict")
    assert texts(tmp_path, "dict/train") == TEXTS


def test_a_saved_data_set_never_leads_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    for name, message in {
        "../x": "which is not in its folder",
        "gone.arrow": "whose file gone.arrow is missing",
    }.items():
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match=message):
            texts(tmp_path, "saved")
    (folder / "state.json").write_text("[]")
    with pytest.raises(DataError, match="is not as `datasets` writes it"):
        texts(tmp_path, "saved")


def test_hugging_face_names_are_files_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "datasets--allenai--c4"
    commit = "0123456789abcdef" * 2 + "01234567"
    for name in ("blobs", "refs", f"snapshots/{commit}/en"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for i in range(2):
        blob = repository / "blobs" / f"{i}"
        blob.write_text(json.dumps({"text": f"text {i}"}) + "\n")
        (repository / "snapshots" / commit / "en" / f"c4-{i}.json").symlink_to(blob)
    assert texts(tmp_path, "hf://datasets/allenai/c4/en/*.json") == ["text 0", "text 1"]
    assert texts(tmp_path, f"hf://datasets/allenai/c4@{commit}/en/c4-1.json") == ["text 1"]
    with pytest.raises(
        DataError, match=r"Nothing is downloaded: run `hf download --repo-type dataset other/name` first"
    ):
        texts(tmp_path, "hf://datasets/other/name/en/*.json")
    with pytest.raises(DataError, match="matches no file"):
        texts(tmp_path, "hf://datasets/allenai/c4/de/*.json")
    (tmp_path / "elsewhere" / "en").mkdir(parents=True)
    (tmp_path / "elsewhere" / "en" / "c4-0.json").write_text('{"text": "private"}\n')
    (repository / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(DataError, match="is not in the Hugging Face cache"):
        texts(tmp_path, "hf://datasets/allenai/c4/en/*.json")
    for name in ("hf://allenai/c4", "hf://datasets/allenai/c4/../../x"):
        with pytest.raises(DataError, match="is not a name of files"):
            texts(tmp_path, name)


def test_text_of_a_store_is_that_of_its_files(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    half = len(rows) // 2 // 19 * 19
    store.pipe("/corpus/a.jsonl", rows[:half].encode())
    store.pipe("/corpus/b.jsonl.gz", gzip.compress(rows[half:].encode()))
    table = io.BytesIO()
    pq.write_table(pa.table({"text": TEXTS}), table)
    store.pipe("/tables/part-0", table.getvalue())
    try:
        assert texts(tmp_path, "memory://corpus/*") == TEXTS
        assert texts(tmp_path, "memory://tables/part-0") == TEXTS
        [first, _] = resolve_domain("d", DomainConfig(text=("memory://corpus/*",)), tmp_path).files
        assert (first.name, first.stat().st_size) == ("memory://corpus/a.jsonl", half)
        with pytest.raises(DataError, match="matches no file"):
            texts(tmp_path, "memory://corpus/c.jsonl")
    finally:
        store.store.clear()


class _WithoutParts(SimpleHTTPRequestHandler):
    """A server that gives complete files only, as Python's does."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    handler = functools.partial(_WithoutParts, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_text_is_read_from_a_web_server(server: str, tmp_path: Path) -> None:
    (tmp_path / "served" / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    )
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "served" / "a.parquet")
    assert texts(tmp_path, f"{server}/a.jsonl.gz") == TEXTS
    assert texts(tmp_path, f"{server}/a.parquet") == TEXTS
    with pytest.raises(DataError, match="matches no file"):
        texts(tmp_path, f"{server}/b.jsonl")


def test_a_store_that_fails_is_an_error_although_bad_lines_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/corpus/a.jsonl", b'{"text": "%s"}\n' % (b"a" * 10_000) * 1_000)
    source = resolve_domain("d", DomainConfig(text=("memory://corpus/a.jsonl",)), tmp_path)
    read = MemoryFile.read
    monkeypatch.setattr(MemoryFile, "read", lambda self, n: read(self, n) if self.tell() < 1 << 22 else 1 / 0)
    try:
        with pytest.raises(
            DataError, match=r"memory://corpus/a\.jsonl cannot be read \(ZeroDivisionError.* run the same"
        ):
            list(read_documents(source, BadLines("skip")))
    finally:
        store.store.clear()


def test_a_store_without_its_package_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(DataError, match=r"needs a package that is not installed: Install s3fs to access S3\. Or copy"):
        texts(tmp_path, "s3://bucket/a.jsonl")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(DataError, match=r"needs fsspec, which is not installed: pip install fsspec\. Or copy"):
        texts(tmp_path, "gs://bucket/*.jsonl")


def test_an_unknown_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fsspec does not know the store 'tape'\. .* copy it here first, or mount"):
        texts(tmp_path, "tape://reel/a.jsonl")
