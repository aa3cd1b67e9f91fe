"""Every supported family gives the same numbers in Megatron-core as in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import HUGGINGFACE_SIZES
from helpers.worlds import run_script
from safetensors.torch import load_file, save_file

from btm_scale.errors import CheckpointError
from btm_scale.model.families import MIXTURES
from btm_scale.model.hf_config import config_json, shape_from_config

SIZES: dict[str, Any] = HUGGINGFACE_SIZES | {"max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "llama with llama3 scaling": {
        "model_type": "llama",
        "rope_parameters": LLAMA3 | {"rope_theta": 500.0, "original_max_position_embeddings": 16},
    },
    "llama with linear scaling": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    },
    "llama with yarn scaling": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 100.0,
            "original_max_position_embeddings": 8,
        },
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "mixtral": {"model_type": "mixtral", "head_dim": 12, "num_local_experts": 3, "num_experts_per_tok": 2},
    "mixtral, one expert per token, a window": {
        "model_type": "mixtral",
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "num_local_experts": 3,
        "num_experts_per_tok": 1,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 20,
        "moe_intermediate_size": 40,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "head_dim": 12,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 24,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 32,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models saved by transformers, each with the results of transformers and of Megatron-core."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}
    for family, settings in FAMILIES.items():
        folders[family] = folder = tmp_path_factory.mktemp(re.sub(r"\W+", "-", family))
        torch.manual_seed(3)
        sizes = SIZES if family != "gpt2" else {"vocab_size": 65}
        config = AutoConfig.for_model(**sizes | settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # otherwise biases are 0 and norm weights 1, which hides bugs
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(folder)
        tokens = torch.randint(0, 65, (2, 23))
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        results = {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach()}
        if settings["model_type"] in MIXTURES:  # transformers stacks the experts, but saves each by itself
            del results["loss"]
            results |= {f"weight/{name}": weight for name, weight in load_file(folder / "model.safetensors").items()}
        else:
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                results |= {f"weight/{name}": parameter.detach(), f"gradient/{name}": parameter.grad}
        (folder / "theirs").mkdir()
        save_file(results, folder / "theirs/computed.safetensors")
    script = Path(__file__).with_name("compute_with_megatron.py")
    spec = {"tensor": [1, 2], "folders": [str(folder) for folder in folders.values()]}
    run_script(script, spec, tmp_path_factory.mktemp("spec"))
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_gives_the_same_results_as_transformers_and_returns_the_weights(
    computed: dict[str, Path], family: str, tensor: int
) -> None:
    theirs = load_file(computed[family] / "theirs/computed.safetensors")
    ours = load_file(computed[family] / f"ours-{tensor}.safetensors")
    assert ours.keys() == theirs.keys() - {"tokens"}, "a tensor is missing, duplicated or unknown"
    for name, value in ours.items():
        if name.startswith("weight/"):
            assert value.equal(theirs[name]), name
        else:
            tolerance = 2e-5 if "mix" in family or "moe" in family else 1e-4
            torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_round_trips_through_config_json(family: str) -> None:
    from transformers import AutoConfig

    settings = (SIZES if family != "gpt2" else {"vocab_size": 65}) | FAMILIES[family]
    shape = shape_from_config(AutoConfig.for_model(**settings).to_dict(), family)
    written = config_json(shape, dtype="float32", end_of_text=2)
    assert shape_from_config(written, family) == shape
    read = AutoConfig.for_model(**json.loads(json.dumps(written))).to_dict()
    assert shape_from_config(read, family) == shape


def test_rotary_settings_from_before_transformers_5_are_read() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}
    shape = shape_from_config(SIZES | {"model_type": "llama"} | old, "config.json")
    assert shape.rope_theta == 5e5
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.original == 8192


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported. Megatron-core trains and shards llama, mistral, qwen2"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "llama with longrope rotary positions"),
        ({"attention_bias": True}, "llama with attention_bias"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "qwen2 with use_sliding_window"),
        ({"num_key_value_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        (FAMILIES["qwen2_moe"] | {"norm_topk_prob": False}, "qwen2_moe with router weights that do not sum to 1"),
        (FAMILIES["qwen2_moe"] | {"qkv_bias": False}, "qwen2_moe with no biases"),
        (FAMILIES["qwen2_moe"] | {"shared_expert_intermediate_size": 0}, "has a shared expert. Set shared_ffn"),
    ],
)
def test_unsupported_configs_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        shape_from_config(SIZES | {"model_type": "llama"} | changes, "config.json")


def test_a_config_without_a_required_size_is_rejected() -> None:
    with pytest.raises(CheckpointError, match="lacks 'hidden_size'"):
        shape_from_config({"model_type": "qwen3", "num_attention_heads": 4}, "config.json")
