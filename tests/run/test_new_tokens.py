"""A pretrained model whose tokenizer has tokens for which the model has no rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.text_samples import prose_texts, python_texts

from btm_scale.config.model import ModelConfig
from btm_scale.data.tokenizer_fit import require_fit
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.errors import ConfigError
from btm_scale.model.hf_config import read_shape
from btm_scale.model.hf_names import with_new_rows

Pretrained = Callable[[int], Path]


@pytest.fixture
def pretrained(tmp_path: Path) -> Pretrained:
    """The config of a model with this many rows, and a tokenizer of 400 tokens."""

    def make(rows: int) -> Path:
        folder = tmp_path / "pretrained"
        folder.mkdir()
        train_tokenizer(folder, prose_texts(200), vocab_size=400)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config: dict[str, Any] = {"model_type": "llama", **sizes, "max_position_embeddings": 64, "vocab_size": rows}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def test_tokens_without_a_row_are_reported_and_get_the_mean_of_the_others(
    pretrained: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pretrained(397)
    require_fit(folder, folder)
    assert f"3 tokens of {folder} have no row in {folder}: new rows start as the mean of the others" in caplog.text
    shape = ModelConfig(pretrained=folder).shape(400, 64)
    assert shape.vocabulary == 400
    stored = {name: torch.randn(397, 8, dtype=torch.bfloat16) for name in ("model.embed_tokens.weight",)}
    stored["model.norm.weight"] = torch.ones(8)
    read = with_new_rows(stored.__getitem__, shape)
    embeddings = read("model.embed_tokens.weight")
    assert torch.equal(embeddings[:397], stored["model.embed_tokens.weight"])
    mean = stored["model.embed_tokens.weight"].float().mean(0).bfloat16()
    assert all(torch.equal(row, mean) for row in embeddings[397:])
    assert len(embeddings) == 400
    assert read("model.norm.weight") is stored["model.norm.weight"]


def test_a_model_with_rows_for_all_tokens_keeps_its_vocabulary(
    pretrained: Pretrained, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pretrained(415)
    require_fit(folder, folder)
    assert not caplog.text
    assert ModelConfig(pretrained=folder).shape(400, 64) == read_shape(folder)


def test_only_an_extension_of_the_models_own_tokenizer_may_have_more_tokens(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = pretrained(397)
    shutil.copytree(folder, tmp_path / "copy")
    require_fit(folder, tmp_path / "copy")
    (tmp_path / "other").mkdir()
    train_tokenizer(tmp_path / "other", python_texts(200), vocab_size=400)
    with pytest.raises(ConfigError, match=r"has 400 tokens, but .* embeddings of 397\. .* extends the model's own"):
        require_fit(folder, tmp_path / "other")
    require_fit(folder, tmp_path / "not downloaded yet")
