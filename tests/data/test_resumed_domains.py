"""A domain whose encoding was interrupted resumes after its last shard, with the files of an uninterrupted one."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.text_samples import MakeConfig, prose_texts, python_texts, write_jsonl

from btm_scale.config.run import RunConfig
from btm_scale.data import encode, token_files
from btm_scale.data.prepare import prepare
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir

STOP_AFTER = 250  # of 300 documents


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SHARD_BYTES", 10_000)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 3_000)


@pytest.fixture
def config(make_config: MakeConfig, prose_tokenizer: Path, tmp_path: Path) -> RunConfig:
    """A domain with duplicates, bad lines and documents that a field keeps together."""
    texts = prose_texts(290)
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts[:10], group=lambda i: f"{i // 3}")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\nnot json\n", 2))
    domain = {"text": "a.jsonl", "split_by": {"field": "group"}}
    return make_config(tmp_path, {"a": domain}, tokenizer={"path": prose_tokenizer}, data={"on_bad_line": "skip"})


def contents(run: RunDir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.domain("a").iterdir())}


@pytest.fixture
def uninterrupted(config: RunConfig, tmp_path: Path) -> dict[str, bytes]:
    prepare(config, RunDir(tmp_path / "uninterrupted"))
    return contents(RunDir(tmp_path / "uninterrupted"))


def interrupt(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
    if documents >= STOP_AFTER:
        raise KeyboardInterrupt


@pytest.fixture
def interrupted(config: RunConfig, tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, run, interrupt)
    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The texts that are encoded."""
    texts: list[str] = []
    original = encode._encode

    def watched(tokenizer: object, batch: list[str], chats: object) -> object:
        texts.extend(batch)
        return original(tokenizer, batch, chats)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "_encode", watched)
    return texts


def journal_of(run: RunDir) -> list[Path]:
    return sorted((run.data / ".a.partial" / "journal").glob("shard-*"))


def test_an_interrupted_domain_resumes_after_its_last_shard(
    config: RunConfig, uninterrupted: dict[str, bytes], interrupted: RunDir, encoded: list[str]
) -> None:
    assert len(journal_of(interrupted)) > 3
    prepare(config, interrupted)
    assert contents(interrupted) == uninterrupted
    assert 0 < len(encoded) < 120  # of the 290 that are not duplicates
    assert not list(interrupted.data.glob(".*"))


def test_a_killed_domain_resumes_after_its_last_shard(
    config: RunConfig, uninterrupted: dict[str, bytes], tmp_path: Path, encoded: list[str]
) -> None:
    run = RunDir(tmp_path / "run")

    def kill(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        if documents >= STOP_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            prepare(config, run, kill)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    prepare(config, run)
    assert contents(run) == uninterrupted
    assert len(encoded) < 120


def test_a_domain_that_filled_the_disk_resumes_after_its_last_shard(
    config: RunConfig, uninterrupted: dict[str, bytes], tmp_path: Path, encoded: list[str]
) -> None:
    run = RunDir(tmp_path / "run")

    def fill(domain: str, encoded_bytes: int, documents: int, expected: int) -> None:
        if documents >= STOP_AFTER:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        prepare(config, run, fill)
    encoded.clear()
    prepare(config, run)
    assert contents(run) == uninterrupted
    assert 0 < len(encoded) < 120


@pytest.mark.parametrize("damage", ["tokens", "truncated tokens", "shard", "no shard"])
def test_what_is_damaged_is_encoded_again(
    config: RunConfig, uninterrupted: dict[str, bytes], interrupted: RunDir, encoded: list[str], damage: str
) -> None:
    tokens, shards = interrupted.data / ".a.partial" / "train.bin", journal_of(interrupted)
    if damage == "tokens":
        content = bytearray(tokens.read_bytes())
        content[len(content) // 2] ^= 1
        tokens.write_bytes(content)
    elif damage == "truncated tokens":
        os.truncate(tokens, tokens.stat().st_size // 2)
    elif damage == "shard":
        shards[2].write_bytes(shards[2].read_bytes()[:-1])
    else:
        shards[2].unlink()
    prepare(config, interrupted)
    assert contents(interrupted) == uninterrupted
    assert 120 < len(encoded) < 290


def test_changed_text_is_encoded_from_the_beginning(
    config: RunConfig, interrupted: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", python_texts(100), group=lambda i: f"{i}")
    prepare(config, interrupted)
    prepare(config, RunDir(tmp_path / "again"))
    assert contents(interrupted) == contents(RunDir(tmp_path / "again"))
    assert "the text of domain 'a' has changed: encoding it from the beginning" in caplog.text


def test_another_tokenizer_begins_again(
    config: RunConfig, interrupted: RunDir, tmp_path: Path, encoded: list[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    train_tokenizer(other, python_texts(50), vocab_size=350)
    changed = config.model_copy(update={"tokenizer": config.tokenizer.model_copy(update={"path": other})})
    interrupted.tokenizer.rename(tmp_path / "former")
    prepare(changed, interrupted)
    assert len(encoded) == 290


def test_a_corrected_line_late_in_the_text_is_not_paid_for_twice(
    config: RunConfig, tmp_path: Path, encoded: list[str]
) -> None:
    strict = config.model_copy(
        update={
            "data": config.data.model_copy(update={"on_bad_line": "error"}),
            "domains": {"a": config.domains["a"].model_copy(update={"split_by": "document"})},
        }
    )
    text, run = tmp_path / "a.jsonl", RunDir(tmp_path / "run")
    good = text.read_bytes().replace(b"not json\n", b"")
    text.write_bytes(good.removesuffix(b"}\n"))
    with pytest.raises(DataError, match=r"a\.jsonl, line 300"):
        prepare(strict, run)
    text.write_bytes(good)
    encoded.clear()
    prepare(strict, run)
    assert 0 < len(encoded) < 80


def test_shards_of_a_domain_that_the_config_no_longer_has_are_removed(
    config: RunConfig, interrupted: RunDir, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "b.jsonl", prose_texts(100))
    domain = config.domains["a"].model_copy(update={"text": ("b.jsonl",), "split_by": "document"})
    other = config.model_copy(update={"domains": {"b": domain}})
    prepare(other, interrupted)
    assert not list(interrupted.data.glob(".*"))
