"""Token files that are damaged, cut off or of another tokenizer are refused by every reader."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.text_samples import python_texts

from btm_scale.config.run import RunConfig
from btm_scale.data.dataset import TrainingSamples
from btm_scale.data.eval_text import EvaluationText
from btm_scale.data.prepare import prepare
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.errors import DataError
from btm_scale.run_dir import RunDir


def require_rejected(config: RunConfig, run: RunDir, domain: str, match: str) -> None:
    """Check that every reader of a domain's token files raises the error."""
    with pytest.raises(DataError, match=match):
        prepare(config, run)
    with pytest.raises(DataError, match=match):
        TrainingSamples(run, {domain: 1}, Tokenizer.load(run.tokenizer), sequence_length=64, samples=10, seed=1)
    with pytest.raises(DataError, match=match):
        EvaluationText.load(run, domain, "test", tokens=100, sequence_length=64)


def test_token_files_of_another_tokenizer_are_rejected_by_every_reader(
    prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, original = prepared
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    shutil.rmtree(run.tokenizer)
    run.tokenizer.mkdir()
    train_tokenizer(run.tokenizer, python_texts(50), vocab_size=512)
    match = r"token files of domain '\w+' were made with another tokenizer \(digest \w+\) than the one in"
    require_rejected(config, run, "prose", match)


def test_truncated_token_files_are_rejected_by_every_reader(prepared: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    config, original = prepared
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    path = run.tokens("code", "dev").with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-2])
    require_rejected(config, run, "code", r"dev\.bin has \d+ bytes, .* prepare the run again")


@pytest.mark.parametrize(
    ("at", "content", "problem"),
    [
        (0, b"MMIDJDX", "is not an index"),
        (9, b"\2", "has version 2"),
        (18, b"\xff" * 7, r"has \d+ bytes, but its \d+ sequences"),
        (-1, b"", r"has \d+ bytes, but"),
        (None, b"", "cannot be read"),
    ],
)
def test_a_damaged_index_is_rejected_by_every_reader(
    at: int | None, content: bytes, problem: str, prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, original = prepared
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    path = run.tokens("code", "dev").with_suffix(".idx")
    whole = path.read_bytes()
    if at is None:
        path.unlink()
    else:
        path.write_bytes(whole[:at] + content + (whole[at + len(content) :] if at >= 0 else b""))
    require_rejected(config, run, "code", rf"dev\.idx {problem}.* prepare the run again")


def test_a_damaged_order_of_samples_and_damaged_keys_are_reported(
    prepared: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, original = prepared
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)

    def samples() -> TrainingSamples:
        tokenizer = Tokenizer.load(run.tokenizer)
        return TrainingSamples(run, {"code": 1}, tokenizer, sequence_length=64, samples=10, seed=1)

    samples()
    (order,) = run.index_cache.glob("*/domain.npy")
    order.write_bytes(order.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"domain\.npy is not the order of 10 samples.* Delete"):
        samples()
    shutil.rmtree(run.domain("prose"))
    keys = run.domain("code") / "dev.keys.npy"
    for content in (b"", b"not an array", keys.read_bytes()[:-3]):
        keys.write_bytes(content)
        with pytest.raises(DataError, match=r"dev\.keys\.npy has no keys of documents .* Copy it again"):
            prepare(config, run)
