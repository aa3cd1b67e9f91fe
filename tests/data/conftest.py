"""Small real text and prepared runs, shared by the tests of data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers.text_samples import CODE, PROSE, MakeConfig, prose_texts, python_texts, write_jsonl

from btm_scale.config.run import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.run_dir import RunDir


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A small config for a folder of text; keywords are sections of the YAML."""

    def make(root: Path, domains: dict[str, Any], **sections: Any) -> RunConfig:
        values: dict[str, Any] = {
            "text_root": root,
            "domains": domains,
            "tokenizer": {"vocab_size": 512, "sample_bytes": 200_000},
            "data": {"workers": 1, "dev": 0.1, "test": 0.1},
            "budget": {"sequence_length": 64, "batch_tokens": 1024, "tokens": 100_000},
        }
        for name, section in sections.items():
            values[name] = values.get(name, {}) | section
        return RunConfig.model_validate(values)

    return make


@pytest.fixture(scope="session")
def text_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """code.jsonl, grouped by `file`, and prose.jsonl."""
    root = tmp_path_factory.mktemp("text")
    write_jsonl(root / "code.jsonl", python_texts(200), file=lambda i: f"module{i // 4}.py#{i}")
    write_jsonl(root / "prose.jsonl", prose_texts(300))
    return root


@pytest.fixture(scope="session")
def prepared(
    text_root: Path, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, RunDir]:
    """A run with the domains code and prose, ready to train on. Not to be changed."""
    config = make_config(text_root, {"code": CODE, "prose": PROSE})
    run = RunDir(tmp_path_factory.mktemp("run"))
    prepare(config, run)
    return config, run


@pytest.fixture(scope="session")
def corpora() -> Path:
    """Eight real domains, where the machine has them."""
    beside = Path(__file__).parents[2].parent / "shared" / "corpora"
    path = Path(os.environ.get("BTM_CORPORA", beside))
    if not (path / "math.jsonl.gz").is_file():
        pytest.skip(f"no corpora at {path}; set BTM_CORPORA to their folder")
    return path
