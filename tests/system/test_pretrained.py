"""A pretrained model as the seed LM of a run: its weights, tokenizer and family survive the round trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Warm

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.data.train_tokenizer import train_tokenizer
from btm_scale.errors import ConfigError, UserError
from btm_scale.run_dir import RunDir

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def write_pretrained(folder: Path, text: Path, family: str) -> Path:
    """Write a random Hugging Face model and a tokenizer, with more embedding rows than tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    lines = (text / "python.jsonl").read_text().splitlines()[:200]
    train_tokenizer(folder, (json.loads(line)["text"] for line in lines), vocab_size=400)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family], vocab_size=415))
    model.save_pretrained(folder)
    return folder


def values(text: Path, pretrained: Path, **changes: Any) -> dict[str, Any]:
    return tiny_values(
        text,
        novel_domains={},
        model={"pretrained": str(pretrained)},
        tokenizer={},
        budget={"tokens": 8 * 1024, "seed_share": 0.0, "sequence_length": 64, "batch_tokens": 1024},
        layout={"precision": "fp32", "micro_batch": 4},
        experts={"python": {"layout": {"tensor": 2, "zero": 2, "sequence_parallel": True}}},
        baselines={},
        evaluate={"tokens_per_domain": 500, "dev_blocks": 5},
        **changes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", full("gpt2")])
def test_a_pretrained_model_is_the_seed_and_its_experts_are_of_its_family(
    family: str, real_text: Path, warm: Warm, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pretrained = write_pretrained(tmp_path / "pretrained", real_text, family)
    write_config(tmp_path / "run.yaml", values(real_text, pretrained))
    run = RunDir(tmp_path / "run")
    warm.check("prepare", tmp_path / "run.yaml", "--out", run.root)
    for model in ("seed", "python"):
        warm.check("train", tmp_path / "run.yaml", "--model", model, "--out", run.root)

    with SafetensorsModel(pretrained) as before, SafetensorsModel(run.model("seed")) as seed:
        tied = {name for name in before.names if name not in seed.names}
        assert tied <= {"lm_head.weight"}
        for name in seed.names:
            assert torch.equal(seed.read(name), before.read(name)), name
        with SafetensorsModel(run.model("python")) as expert:
            assert any(not torch.equal(expert.read(name), seed.read(name)) for name in seed.names)
    losses = [json.loads(line)["loss"] for line in run.metrics("python").read_text().splitlines()]
    assert losses[-1] < losses[0]

    loaded = AutoModelForCausalLM.from_pretrained(run.model("python"))
    assert loaded.config.model_type == family
    assert loaded.config.vocab_size == 415
    text = "def f(x):\n    return x + 1\n"
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (pretrained, run.model("python")))
    assert ours.encode(text) == theirs.encode(text)


def test_settings_that_conflict_with_a_pretrained_model_are_errors(real_text: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"is not a model: it has no config\.json"):
        write_config(tmp_path / "run.yaml", values(real_text, tmp_path / "model"))
    config = {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "vocab_size": 50,
        "layer_norm_epsilon": 1e-5,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="longer than the 32 positions"):
        write_config(tmp_path / "run.yaml", values(real_text, tmp_path / "model"))
    given = values(real_text, tmp_path / "model")
    with pytest.raises(ConfigError, match="Cannot set layers with pretrained"):
        write_config(tmp_path / "run.yaml", given | {"model": given["model"] | {"layers": 3}})
