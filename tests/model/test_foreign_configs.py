"""What transformers loads from a model directory: no setting of any part of a config runs code or leads elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_tokenizers import write
from helpers.small_families import write_family

from btm_scale.errors import CheckpointError
from btm_scale.model.hf_load import completed_config, load_causal_lm, load_config, load_tokenizer

ACTIVE = {
    "attn_implementation": "stranger/kernel",
    "_attn_implementation": "stranger/kernel",
    "experts_implementation": "stranger/kernel",
    "auto_map": {"AutoModel": "canary.Model"},
}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


def write_config(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_the_parts_of_a_model_fetch_no_kernels_either(tmp_path: Path) -> None:
    parts = {"text_config": SMALL | ACTIVE, "vision_config": SMALL | ACTIVE}
    config = load_config(write_config(tmp_path, model_type="gemma3", **parts, **ACTIVE))
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation is None
        assert part._experts_implementation is None
        assert not hasattr(part, "auto_map")
    assert config.text_config.hidden_size == 16
    full = completed_config({"model_type": "gemma3", **parts})
    assert full is not None
    assert "stranger" not in json.dumps(full)


def test_transformers_fetches_no_kernels_for_families_of_its_choice() -> None:
    from transformers.integrations import hub_kernels

    assert os.environ["USE_HUB_KERNELS"] == "0"
    assert not hub_kernels._kernels_enabled


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "link.safetensors"])
def test_an_index_that_leads_out_of_a_model_is_not_followed_by_transformers(shard: str, tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    write_family(model, "olmo2")
    other.mkdir()
    (model / "model.safetensors").rename(other / "model.safetensors")
    if shard == "link.safetensors":
        (model / shard).symlink_to(other / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"refers to the file|is a link to"):
        load_causal_lm(model)


def test_a_config_with_absurdly_many_layers_is_refused_before_any_is_built(tmp_path: Path) -> None:
    write_config(tmp_path, model_type="llama", **SMALL | {"num_hidden_layers": 10**9})
    with pytest.raises(CheckpointError, match="more than 100,000 layers"):
        load_causal_lm(tmp_path)


def test_a_tokenizer_reads_no_file_that_its_config_names_elsewhere(tmp_path: Path) -> None:
    def with_secret(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["secret"] = len(tokenizer["model"]["vocab"])

    elsewhere, own = write(tmp_path / "elsewhere", with_secret), write(tmp_path / "own")
    settings = json.loads((own / "tokenizer_config.json").read_text())
    for name in ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file", "special_tokens_map_file"):
        settings[name] = str(elsewhere / "tokenizer.json")
    settings |= {"name_or_path": str(elsewhere), "chat_template_file": str(elsewhere / "tokenizer.json")}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "secret" not in load_tokenizer(own).get_vocab()
