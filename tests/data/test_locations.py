"""Where text is: data sets that `datasets` saved, the Hugging Face cache, and a clear refusal of what is elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

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
    for name in ("hf://allenai/c4", "hf://datasets/allenai/c4/../../x"):
        with pytest.raises(DataError, match="is not a name of files"):
            texts(tmp_path, name)


@pytest.mark.parametrize("name", ["s3://bucket/a.jsonl", "gs://bucket/*.jsonl", "https://example.com/a.txt"])
def test_a_remote_name_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"is not on this machine\. .* copy it here first, or mount the store"):
        texts(tmp_path, name)
