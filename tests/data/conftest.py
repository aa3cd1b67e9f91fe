"""What data tests share: corpora, if this machine has them, and a small tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.text_samples import prose_texts

from btm_scale.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def corpora() -> Path:
    """Eight real domains, if this machine has them."""
    beside = Path(__file__).parents[2].parent / "shared" / "corpora"
    path = Path(os.environ.get("BTM_CORPORA", beside))
    if not (path / "math.jsonl.gz").is_file():
        pytest.skip(f"no corpora at {path}; set BTM_CORPORA to their folder")
    return path


@pytest.fixture(scope="session")
def prose_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 tokens, which no test changes."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(directory, prose_texts(100), vocab_size=400)
    return directory
