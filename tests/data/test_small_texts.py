"""Small and odd texts: no split stays empty by chance, and a refusal names settings that work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.text_samples import MakeConfig, prose_texts, write_jsonl
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Done, Warm
from hypothesis import given
from hypothesis import strategies as st

from btm_scale.config.data import DataConfig, DomainConfig
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import apply_overrides
from btm_scale.data.documents import BadLines, Document, read_documents
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare
from btm_scale.data.preview import preview_texts
from btm_scale.data.sources import resolve_domain, resolve_sources
from btm_scale.data.splits import ByPosition, identify, placement_of
from btm_scale.errors import DataError
from btm_scale.run_dir import SPLITS, RunDir

SPLIT = DataConfig(dev=0.1, test=0.1, workers=1)


def book(size: int) -> str:
    """Prose with blank lines, of `size` characters."""
    paragraphs = prose_texts(2_000)
    text = "\n\n".join(paragraphs)
    return (text * (size // len(text) + 1))[:size]


def values(root: Path, **sections: Any) -> dict[str, Any]:
    write_jsonl(root / "ok.jsonl", prose_texts(300))
    return {
        "text_root": root,
        "domains": {"ok": {"text": "ok.jsonl"}, "book": {"text": "input.txt"}},
        "tokenizer": {"vocab_size": 512, "sample_bytes": 100_000},
        "data": {"dev": 0.1, "test": 0.1, "workers": 1},
        "budget": {"sequence_length": 64, "batch_tokens": 2048, "tokens": 20_480},
    } | sections


def test_one_plain_text_file_is_split_into_contiguous_parts(tmp_path: Path) -> None:
    text = book(1_000_000)
    (tmp_path / "input.txt").write_text(text)
    config = RunConfig.model_validate(values(tmp_path))
    fingerprint = prepare(config, RunDir(tmp_path / "run"))["book"]
    assert fingerprint.placement == "position"
    sizes = {split: counts.bytes for split, counts in fingerprint.splits.items()}
    assert sum(sizes.values()) == len(text.encode())
    for split in ("dev", "test"):
        assert 90_000 < sizes[split] < 110_000
    # The same call again checks the files and changes nothing.
    assert prepare(config, RunDir(tmp_path / "run"))["book"] == fingerprint


@pytest.mark.parametrize(
    "size",
    [1_000, 2_000, 10_000, 100_000, pytest.param(40_000_000, marks=pytest.mark.full)],
    ids=lambda size: f"{size}",
)
def test_a_text_of_any_size_is_prepared_or_its_remedy_works(tmp_path: Path, size: int) -> None:
    (tmp_path / "input.txt").write_text(book(size))
    given = values(tmp_path)
    for look in (preview, prepare_new):
        refused = look(given, tmp_path)
        if refused is not None:
            settings = re.findall(r"--set ([^\s`]+)", refused)
            assert settings, refused
            assert look(apply_overrides(given, tuple(settings), ()), tmp_path) is None, refused


@pytest.mark.full
@pytest.mark.parametrize("size", [1_000, 100_000])
def test_one_text_alone_trains_to_the_page_as_it_is_or_with_the_remedy(tmp_path: Path, warm: Warm, size: int) -> None:
    (tmp_path / "input.txt").write_text(book(size))
    changes: dict[str, Any] = {"domains": {"book": {"text": "input.txt"}}, "novel_domains": {}}
    write_config(tmp_path / "run.yaml", tiny_values(tmp_path, **changes))
    command = ("run", tmp_path / "run.yaml", "--out")
    # The dry run estimates the tokens that the run counts, so that either may be the first to refuse.
    remedy = remedy_of(warm.run(*command, tmp_path / "looked", "--dry-run"))
    done = warm.run(*command, tmp_path / "run", *remedy)
    if done.code:
        done = warm.check(*command, tmp_path / "again", *remedy_of(done))
    (page,) = tmp_path.glob("*/report.html")
    assert "book" in page.read_text()


def remedy_of(done: Done) -> list[str]:
    """Return the options that a refused command names."""
    settings = re.findall(r"--set [^\s`]+", done.stderr) if done.code else []
    assert bool(settings) == bool(done.code), done.stderr
    return [word for setting in settings for word in setting.split()]


def preview(given: dict[str, Any], folder: Path) -> str | None:
    """Return why a dry run refuses a config."""
    config = RunConfig.model_validate(given)
    try:
        preview_texts(resolve_sources(config.all_domains, folder), config, 512)
    except DataError as error:
        return str(error)
    return None


def prepare_new(given: dict[str, Any], folder: Path) -> str | None:
    """Return why a config cannot be prepared in a new folder."""
    run = RunDir(folder / f"run{len(list(folder.glob('run*')))}")
    try:
        prepare(RunConfig.model_validate(given), run)
    except DataError as error:
        return str(error)
    assert all(counts.tokens for counts in Fingerprint.of_domain(run, "book").splits.values())
    return None


def test_passages_make_documents_of_a_long_text(tmp_path: Path, make_config: MakeConfig) -> None:
    text = book(200_000)
    (tmp_path / "input.txt").write_text(text)
    source = resolve_domain("d", DomainConfig.model_validate({"text": "input.txt", "passages": "2KB"}), tmp_path)
    passages = [document.text for document in read_documents(source, BadLines())]
    assert "".join(passages) == text
    assert len(passages) > 50
    assert max(map(len, passages)) < 4_200
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl holds rows, and `passages` cuts plain text only"):
        prepare(make_config(tmp_path, {"d": {"text": "rows.jsonl", "passages": 2000}}), RunDir(tmp_path / "run"))


def test_max_bytes_takes_the_beginning_of_every_file(tmp_path: Path) -> None:
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i:04d} " + "x" * 94 for i in range(1_000)])

    def read(limit: int) -> Iterator[Document]:
        settings = DomainConfig.model_validate({"text": "*.jsonl", "max_bytes": limit})
        return read_documents(resolve_domain("d", settings, tmp_path), BadLines())

    sample = [document.text for document in read(20_000)]
    assert [text[:5] for text in sample] == [f"{name}{i:04d}" for name in "ab" for i in range(100)]
    assert len(list(read(10**9))) == 2_000
    assert len(list(read(1))) == 1  # never nothing


def documents_of(folder: Path, texts: list[str]) -> Path:
    write_jsonl(folder / "few.jsonl", texts)
    return folder


@pytest.mark.parametrize("count", [3, 4, 8, 20])
def test_no_split_of_a_few_documents_is_empty(tmp_path: Path, count: int) -> None:
    for number in range(20):
        texts = [f"document {number} {i} {'x' * (i + 1) * 10}" for i in range(count)]
        source = resolve_domain("d", DomainConfig(text=("few.jsonl",)), documents_of(tmp_path, texts))
        placement = placement_of(source, SPLIT, SPLITS)
        placed = list(placement.placed(read_documents(source, BadLines())))
        assert {identity.split for _, identity in placed} == set(SPLITS)
        assert [document.text for document, _ in placed] == texts  # whole and in order
        usual = [identify(Document(text, None, ""), dev=0.1, test=0.1).split for text in texts]
        if set(usual) == set(SPLITS):
            assert [identity.split for _, identity in placed] == usual


def test_few_files_that_stay_whole_are_spread_over_the_splits(tmp_path: Path) -> None:
    for i in range(4):
        write_jsonl(tmp_path / f"{i}.jsonl", [f"{i} {j}" for j in range(10)])
    source = resolve_domain("d", DomainConfig.model_validate({"text": "*.jsonl", "split_by": "file"}), tmp_path)
    placed = list(placement_of(source, SPLIT, SPLITS).placed(read_documents(source, BadLines())))
    splits = [{identity.split for _, identity in placed[10 * i : 10 * i + 10]} for i in range(4)]
    assert all(len(one) == 1 for one in splits)
    assert set.union(*splits) == set(SPLITS)


@given(
    st.lists(st.text(alphabet="aé \n最🎉", min_size=1, max_size=400), min_size=1, max_size=6),
    st.floats(0.01, 0.45),
    st.floats(0.01, 0.45),
)
def test_splitting_by_position_loses_nothing_and_keeps_the_order(texts: list[str], dev: float, test: float) -> None:
    total = sum(len(text.encode()) for text in texts)
    placement = ByPosition(total, dev, test)
    placed = list(placement.placed(Document(text, None, "") for text in texts))
    assert "".join("".join(document.text for document, _ in placed).split()) == "".join("".join(texts).split())
    splits = [SPLITS.index(identity.split) for _, identity in placed]
    assert splits == sorted(splits)
    for split, share in (("dev", dev), ("test", test)):
        size = sum(identity.bytes for _, identity in placed if identity.split == split)
        assert size <= share * total + min(dev, test) * total / 4 + 8


def test_a_text_in_two_places_of_a_text_split_by_position_is_held_out_once(
    tmp_path: Path, make_config: MakeConfig
) -> None:
    texts = prose_texts(300)
    write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:5]])
    write_jsonl(tmp_path / "b.jsonl", texts)
    domains = {"a": {"text": "a.jsonl", "split_by": "position"}, "b": {"text": "b.jsonl"}}
    fingerprints = prepare(make_config(tmp_path, domains), RunDir(tmp_path / "run"))
    assert fingerprints["a"].duplicates >= 5
    # Texts that the other domain has in another split are dropped from it.
    assert fingerprints["b"].duplicates > 20


def test_settings_of_the_first_version_leave_the_fingerprint_as_it_was(
    text_root: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    config = make_config(text_root, {"prose": {"text": "prose.jsonl"}})
    fingerprint = prepare(config, run)["prose"]
    assert set(fingerprint.document()) == {
        *("schema", "domain", "sources", "settings", "tokenizer", "dtype", "text", "splits", "skipped_lines"),
        "duplicates",
    }
    settings = {"field": "text", "split_by": "document", "dev": 0.1, "test": 0.1, "on_bad_line": "error"}
    assert fingerprint.settings == settings
    named = make_config(text_root, {"prose": {"text": "prose.jsonl", "max_bytes": 10_000}})
    with pytest.raises(DataError, match=r"max_bytes was None and is 10000"):
        prepare(named, run)
