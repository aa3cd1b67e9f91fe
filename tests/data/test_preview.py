"""A dry run's preview of each domain: format errors are reported by name, and sizes are estimated."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from btm_scale.config.run import RunConfig
from btm_scale.data.preview import Preview, preview_texts
from btm_scale.data.sources import resolve_sources
from btm_scale.errors import DataError

WORDS = "a text of some words that a newcomer wrote "


def rows(count: int, **more: str) -> str:
    return "".join(json.dumps({"text": f"{i} {WORDS * 4}"} | more) + "\n" for i in range(count))


def preview(folder: Path, domains: dict[str, Any], **sections: Any) -> dict[str, Preview]:
    values = {"text_root": folder, "domains": domains, "data": {"dev": 0.1, "test": 0.1, "workers": 1}}
    values["budget"] = {"sequence_length": 64, "batch_tokens": 1024}
    config = RunConfig.model_validate(values | sections)
    return preview_texts(resolve_sources(config.all_domains, folder), config, 4096)


def test_a_domain_of_two_short_documents_is_refused_with_its_splits_and_a_remedy(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(WORDS * 5 + name)
    with pytest.raises(DataError, match=r"^Domain 'law' is too small to split: train has \d documents with") as raised:
        preview(tmp_path, {"law": {"text": "*.txt"}})
    assert "Each needs at least 65 tokens (budget.sequence_length + 1). Add text, or run with `--set" in str(
        raised.value
    )


def test_the_problems_of_all_domains_are_reported_at_once_each_with_its_domain_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "math.jsonl").write_text(rows(200).replace('"text"', '"body"'))
    (tmp_path / "law.jsonl").write_text("")
    (tmp_path / "good.jsonl").write_text(rows(200))
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "mail.parquet")
    domains = {name: {"text": f"{name}.jsonl"} for name in ("math", "law", "good")}
    with pytest.raises(DataError) as raised:
        preview(tmp_path, domains | {"mail": {"text": "mail.parquet"}})
    math, law, mail = str(raised.value).split("\n")
    assert math.startswith("Domain 'math': ")
    assert "no field 'text'; fields are 'body'. Set `field` of the domain to one of them" in math
    assert law.startswith("Domain 'law' is empty")
    assert mail.startswith("Domain 'mail': ")
    assert "has no column 'text', only content. Set the domain's field" in mail


def test_the_first_documents_are_read_and_one_of_each_of_a_few_other_files(tmp_path: Path) -> None:
    big = rows(12_000)
    assert len(big) > 2 << 20
    (tmp_path / "a.jsonl").write_text(big + "not JSON\n")
    assert preview(tmp_path, {"law": {"text": "*.jsonl"}})["law"].text_bytes > 1 << 20
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: no field 'text'"):
        preview(tmp_path, {"law": {"text": "*.jsonl"}})


def test_rows_without_text_are_not_searched_to_the_end_of_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n' * 20_000 + rows(200))
    with pytest.raises(DataError, match=r"Domain 'law': none of its first 10,000 lines holds a document"):
        preview(tmp_path, {"law": {"text": "a.jsonl"}}, data={"on_bad_line": "skip"})


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bytes_of_text_are_estimated_without_other_fields_and_compression(suffix: str, tmp_path: Path) -> None:
    text = rows(15_000, other="y" * 400)
    size = sum(len(json.loads(line)["text"]) for line in text.splitlines())
    assert size > 2 << 20
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(text.encode()))
    law = preview(tmp_path, {"law": {"text": f"a.jsonl{suffix}"}})["law"]
    assert 0.9 * size < law.text_bytes < 1.1 * size
    assert law.tokens == pytest.approx(law.text_bytes / 3.17, rel=0.01)


def test_a_large_domain_whose_dev_text_is_probably_too_short_gets_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(12_000))
    budget = {"sequence_length": 131_072, "batch_tokens": 131_072 * 8}
    law = preview(tmp_path, {"law": {"text": "a.jsonl"}}, budget=budget)["law"]
    assert law.problem.startswith("Domain 'law' may be too small: its dev or test split has about")
    assert not preview(tmp_path, {"law": {"text": "a.jsonl"}})["law"].problem
