"""Megatron's checkpoints without config.json, and its format before `torch_dist`.

Megatron-LM, which writes them, is not a package: the files are written here as its `checkpointing.py` does, with a
Namespace of arguments and the state dict of each rank's Megatron-core model.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.inspect import inspect
from btm_scale.errors import CheckpointError

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, "rms_norm_eps": 1e-5}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **ROTARY),
    "qwen2": Qwen2Config(**SIZES, **ROTARY),
    "qwen3": Qwen3Config(**SIZES, **ROTARY, head_dim=16, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=16),
}
ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 16,
    "padded_vocab_size": 64,
    "vocab_size": None,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "rotary_base": 5000,
    "rotary_percent": 1.0,
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "num_experts": None,
    "params_dtype": torch.bfloat16,
}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {
        "qk_layernorm": True,
        "kv_channels": 16,
        "untie_embeddings_and_output_weights": False,
    },
    "gpt2": {
        "group_query_attention": False,
        "ffn_hidden_size": 128,
        "untie_embeddings_and_output_weights": False,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
    },
}


def arguments(family: str, **changes: object) -> Namespace:
    return Namespace(**ARGUMENTS | OTHERS[family] | changes)


def original(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).save_pretrained(folder)
    return folder


def legacy(base: Path, folder: Path, args: Namespace, *, tensor: int = 1, pipeline: int = 1) -> Path:
    """Write a legacy checkpoint of iteration 7."""
    parts = folder.with_name("parts")
    convert(base, parts, to="deepspeed", tensor=tensor)
    iteration = folder / "iter_0000007"
    for rank, file in enumerate(sorted(parts.rglob("mp_rank_*_model_states.pt"))):
        module = torch.load(file)["module"]
        layers = 1 + max(int(match[1]) for name in module if (match := re.match(r"decoder\.layers\.(\d+)", name)))
        per_stage = layers // pipeline
        for stage in range(pipeline):
            own: dict[str, object] = {}
            for name, weight in module.items():
                match = re.fullmatch(r"decoder\.layers\.(\d+)(\..*)", name)
                if match is None:
                    if stage == (0 if name.startswith("embedding.") else pipeline - 1):
                        own[name] = weight
                elif int(match[1]) // per_stage == stage:
                    own[f"decoder.layers.{int(match[1]) % per_stage}{match[2]}"] = weight
            if 0 < stage == pipeline - 1 and "output_layer.weight" not in module:
                own["output_layer.weight"] = module["embedding.word_embeddings.weight"]
            own["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pipeline > 1 else "")
            (iteration / name).mkdir(parents=True)
            content = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "model": own}
            torch.save(content, iteration / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


def require_original(folder: Path, base: Path, out: Path) -> None:
    convert(folder, out, to="huggingface", verify=True)
    expected, written = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name.removeprefix("transformer.") for name in written} == {
        name.removeprefix("transformer.") for name in expected
    }
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (base, out)]
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        ours, theirs = (model(tokens).logits for model in models)
    assert ours.equal(theirs)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_torch_dist_checkpoint_without_config_is_read_by_its_arguments(tmp_path: Path, family: str) -> None:
    base = original(family, tmp_path / "base")
    convert(base, tmp_path / "dist", to="megatron")
    (tmp_path / "dist/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_model(tmp_path / "dist")
    torch.save({"args": arguments(family), "iteration": 7}, tmp_path / "dist/common.pt")
    assert inspect(tmp_path / "dist").family == family
    require_original(tmp_path / "dist", base, tmp_path / "out")


@pytest.mark.parametrize(("family", "tensor", "pipeline"), [("llama", 2, 2), ("qwen3", 1, 2), ("gpt2", 2, 1)])
def test_a_legacy_checkpoint_is_read(tmp_path: Path, family: str, tensor: int, pipeline: int) -> None:
    base = original(family, tmp_path / "base")
    folder = legacy(base, tmp_path / "legacy", arguments(family), tensor=tensor, pipeline=pipeline)
    facts = inspect(folder)
    assert (facts.format, facts.family, facts.step, facts.problem) == ("megatron legacy", family, 7, None)
    assert len(facts.files) == tensor * pipeline
    require_original(folder, base, tmp_path / "out")


def test_a_missing_rank_of_a_legacy_checkpoint_is_refused(tmp_path: Path) -> None:
    base = original("llama", tmp_path / "base")
    folder = legacy(base, tmp_path / "legacy", arguments("llama"), tensor=2, pipeline=2)
    (folder / "iter_0000007/mp_rank_01_000/model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks the file of tensor rank 1 and pipeline rank 0"):
        open_model(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"language_model": {}}}, "former model classes"),
        ({"model0": {}, "model1": {}}, "interleaved pipeline stages"),
        ({"model": {}}, "no tensors in 'model'"),
    ],
)
def test_other_legacy_checkpoints_are_refused_by_name(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(content | {"args": arguments("llama")}, tmp_path / "mp_rank_00/model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_model(tmp_path)
    (tmp_path / "mp_rank_00").rename(tmp_path / "mp_rank_00_000_001")
    with pytest.raises(CheckpointError, match="expert parallelism"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_experts": 8}, "'num_experts' is 8"),
        ({"rotary_percent": 0.5}, "rotary_percent 0.5"),
        ({"normalization": "LayerNorm"}, "normalization 'LayerNorm'"),
        ({"hidden_size": None}, "hidden: Input should be a valid integer"),
        ({"num_layers": "4"}, "layers: Input should be a valid integer"),
    ],
)
def test_arguments_of_other_models_are_refused_by_name(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    base = original("llama", tmp_path / "base")
    convert(base, tmp_path / "dist", to="megatron")
    (tmp_path / "dist/config.json").unlink()
    torch.save({"args": arguments("llama", **change)}, tmp_path / "dist/common.pt")
    with pytest.raises(CheckpointError, match=reason):
        open_model(tmp_path / "dist")
