"""Token files that exist already as the source of a domain."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.text_samples import MakeConfig, prose_texts, write_jsonl
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from btm_scale.config.data import DomainConfig
from btm_scale.config.run import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.data.preview import preview_texts
from btm_scale.data.sources import resolve_sources
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.errors import ConfigError, DataError
from btm_scale.run_dir import SPLITS, RunDir

TEXTS = prose_texts(300)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, TEXTS, vocab_size=512)
    return Tokenizer.load(directory)


def write_tokens(prefix: Path, documents: Sequence[Sequence[int]], dtype: type[np.generic] = np.uint16) -> None:
    """Write an indexed dataset as Megatron-core's preprocess_data.py does, with the dtypes of its vocabulary's size."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids, dtype), [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def config(tokenizer: Tokenizer, make_config: MakeConfig, tmp_path: Path) -> Callable[..., RunConfig]:
    """A config whose domain `tokens` has token files, with the tokenizer that made them."""

    def make(**domain: Any) -> RunConfig:
        domains = {"tokens": {"token_files": "corpus_text_document"} | domain}
        return make_config(tmp_path, domains, tokenizer={"path": str(tokenizer.directory)})

    return make


def stored(run: RunDir, domain: str) -> dict[str, list[list[int]]]:
    return {
        split: [document.tolist() for document in IndexedDataset(str(run.tokens(domain, split)))] for split in SPLITS
    }


@pytest.mark.parametrize("ends", [True, False], ids=["with end of text", "without"])
def test_token_files_give_the_documents_that_their_text_gives(
    ends: bool, config: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    end = [tokenizer.eos] if ends else []
    write_tokens(tmp_path / "corpus_text_document", [tokenizer.encode(text) + end for text in TEXTS], np.int32)
    write_jsonl(tmp_path / "text.jsonl", TEXTS)
    of_tokens = prepare(config(), RunDir(tmp_path / "one"))["tokens"]
    of_text = prepare(config(token_files=(), text="text.jsonl"), RunDir(tmp_path / "other"))["tokens"]
    assert of_tokens.splits == of_text.splits
    assert of_tokens.text == of_text.text
    assert stored(RunDir(tmp_path / "one"), "tokens") == stored(RunDir(tmp_path / "other"), "tokens")


def test_ids_are_kept_as_they_are_although_the_tokenizer_would_choose_others(
    config: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ids = {letter: tokenizer.encode(letter) for letter in set("".join(TEXTS))}
    by_character = [[token for letter in text for token in ids[letter]] for text in TEXTS]
    write_tokens(tmp_path / "corpus_text_document", by_character)
    run = RunDir(tmp_path / "run")
    prepare(config(), run)
    documents = [document[:-1] for split in stored(run, "tokens").values() for document in split]
    assert sorted(documents) == sorted(by_character)
    assert by_character[0] != tokenizer.encode(TEXTS[0])


def test_an_existing_copy_of_held_out_text_is_no_document_of_another_split(
    config: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "corpus_text_document", [tokenizer.encode(text) for text in [*TEXTS, *TEXTS[:50]]])
    assert prepare(config(), RunDir(tmp_path / "run"))["tokens"].duplicates == 50


def test_one_long_document_is_split_by_position(
    config: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_tokens(tmp_path / "corpus_text_document", [tokenizer.encode("\n\n".join(TEXTS))])
    fingerprint = prepare(config(), RunDir(tmp_path / "run"))["tokens"]
    assert fingerprint.placement == "position"
    assert min(counts.tokens for counts in fingerprint.splits.values()) > 500


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def patched(offset: int, form: str, value: int) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        content = bytearray(path.read_bytes())
        struct.pack_into(form, content, offset, value)
        path.write_bytes(content)

    return patch


@pytest.mark.parametrize(
    ("suffix", "damage", "message"),
    [
        (".bin", cut, r"corpus_text_document\.bin has [\d,]+ bytes, and its index describes"),
        (".idx", cut, r"corpus_text_document\.idx has [\d,]+ bytes, and its 300 sequences need"),
        (".idx", patched(18, "<Q", 1 << 62), r"sequences need"),
        (".idx", patched(17, "<B", 7), r"version 1 and element type 7"),
        (".idx", patched(34, "<i", -5), r"sequences that do not follow each other"),
        (".idx", patched(34 + 12 * 300 + 8 * 3, "<q", 1 << 40), r"documents that do not follow each other"),
        (".idx", lambda path: path.write_bytes(b"TNTIDX\0\0" + path.read_bytes()[8:]), r"fairseq's old format"),
        (".idx", lambda path: path.write_bytes(b""), r"does not begin like the index"),
        (".bin", Path.unlink, r"corpus_text_document\.bin is missing"),
        (".idx", Path.unlink, r"matches no file"),
        (".bin", patched(40, "<H", 512), r"document 1: id 512 is not in the tokenizer of 512 tokens"),
    ],
)
def test_damaged_token_files_are_refused_by_name(
    suffix: str,
    damage: Callable[[Path], object],
    message: str,
    config: Callable[..., RunConfig],
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    write_tokens(tmp_path / "corpus_text_document", [tokenizer.encode(text) for text in TEXTS])
    damage(tmp_path / f"corpus_text_document{suffix}")
    with pytest.raises(DataError, match=message):
        prepare(config(), RunDir(tmp_path / "run"))
    assert not (tmp_path / "run" / "data" / "tokens").exists()


def test_a_dry_run_counts_the_tokens_and_notes_files_of_another_tokenizer(
    config: Callable[..., RunConfig], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def preview() -> Any:
        domains, path = config().all_domains, tokenizer.directory
        return preview_texts(resolve_sources(domains, tmp_path, path), config(), tokenizer.vocab_size)["tokens"]

    repeated = [ids for text in TEXTS for ids in 60 * [tokenizer.encode(text)]]
    write_tokens(tmp_path / "corpus_text_document", repeated)
    assert preview().tokens == pytest.approx(sum(map(len, repeated)), abs=1)
    assert preview().problem == ""
    rng = np.random.default_rng(0)
    write_tokens(tmp_path / "corpus_text_document", [rng.integers(259, 512, 400).tolist() for _ in range(2_000)])
    assert "may be of a different tokenizer" in preview().problem


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({}, "has neither text nor token_files"),
        ({"text": "a", "token_files": "b"}, "has both text and token_files"),
        ({"token_files": "b", "field": "body", "max_bytes": "1MB"}, "has token_files and field and max_bytes"),
        ({"token_files": "b", "split_by": "file"}, "has token_files and split_by"),
    ],
)
def test_settings_of_text_are_refused_for_token_files(domain: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DomainConfig.model_validate(domain)


def test_token_files_need_the_tokenizer_that_made_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("domains: {d: {token_files: corpus}}\n")
    with pytest.raises(ConfigError, match=r"d: token_files need the tokenizer that made them\. Set tokenizer\.path"):
        RunConfig.load(tmp_path / "run.yaml")
