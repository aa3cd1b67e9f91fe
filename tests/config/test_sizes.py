"""Sizes in bytes, in a YAML, in an override and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.config.section import bytes_from_text
from btm_scale.errors import ConfigError, UserError

SIZES = [
    ("8GB", 8 * 10**9),
    ("500MiB", 500 * 2**20),
    ("1.5GiB", 3 * 2**29),
    ("8 gb", 8 * 10**9),
    (" 10kB ", 10_000),
    ("1e9", 10**9),
    ("1000000000", 10**9),
    ("2TB", 2 * 10**12),
]
NOT_SIZES = [
    *("8 bananas", "much", "", "GB", "-1", "-8GB", "0", "0GB", "0.3B", "nan", "inf", "-inf", "1e400", "1.5"),
    *("8GB now", "1.5.3GB", "1,000", "8GB 9GB", "1e3GB", "9" * 400),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_a_size_is_a_number_of_bytes_or_has_a_unit(tmp_path: Path, text: str, size: int) -> None:
    assert bytes_from_text(text) == size
    assert type(bytes_from_text(text)) is int
    path = tmp_path / "my.yaml"
    path.write_text(f"domains: {{math: {{text: m}}}}\ntokenizer: {{sample_bytes: {text}}}\n")
    assert RunConfig.load(path).tokenizer.sample_bytes == size
    path.write_text("domains: {math: {text: m}}\n")
    config = RunConfig.load(path, (f"tokenizer.sample_bytes={text}",))
    assert config.tokenizer.sample_bytes == size
    config.save(tmp_path / "run.yaml")
    assert RunConfig.load(tmp_path / "run.yaml") == config


@pytest.mark.parametrize("text", NOT_SIZES, ids=lambda text: text[:20])
def test_what_is_not_a_size_is_refused_with_examples(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"^Invalid size '.*'\. A size is .*: write 1000000000, 1e9, 8GB or 500MiB\.$"):
        bytes_from_text(text)
    path = tmp_path / "my.yaml"
    path.write_text(f"domains: {{math: {{text: m}}}}\ntokenizer: {{sample_bytes: '{text}'}}\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.sample_bytes: Invalid size"):
        RunConfig.load(path)


@pytest.mark.parametrize("text", ["true", "null", "[1]", "{a: 1}", "-5", "0", ".inf", ".nan", "1.5"])
def test_a_value_that_is_not_a_size_is_refused_in_a_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"domains: {{math: {{text: m}}}}\ntokenizer: {{sample_bytes: {text}}}\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.sample_bytes: Invalid size"):
        RunConfig.load(path)
