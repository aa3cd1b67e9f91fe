"""What is written has all the weights that config.json calls for, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, write_model
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.expected import FAMILIES_WITH_TENSORS, expected_tensors
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.checkpoint.targets import require_trainable
from btm_scale.errors import CheckpointError

SIZES = {
    "vocab_size": 65,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MULTI_HEAD = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SIZES),
    ("llama", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("mistral", SIZES | {"head_dim": 6}),
    ("qwen2", SIZES),
    ("qwen3", SIZES | {"attention_bias": True, "head_dim": 6}),
    ("gemma", SIZES | {"head_dim": 8}),
    ("gemma2", SIZES | {"head_dim": 8}),
    ("gemma3_text", SIZES | {"head_dim": 8}),
    ("phi3", SIZES),
    ("olmo2", SIZES),
    ("olmo3", SIZES),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 65}),
    ("opt", MULTI_HEAD | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    ("opt", MULTI_HEAD | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    ("gpt_neox", MULTI_HEAD),
]
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}  # transformers stacks their experts in memory, but not in files


def lacking(weights: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in weights.items() if part not in name}


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
def test_the_expected_tensors_are_those_of_transformers(family: str, settings: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    expected = expected_tensors(config.to_dict())
    assert expected is not None
    body = {f"{expected.prefix}{name}": shape for name, shape in expected.body.items()}
    described = [body | {head: shape} for head, shape in expected.heads.items()]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} in described
    assert expected.tied == config.tie_word_embeddings
    assert {name for name, _ in VARIANTS} | MIXTURES == set(FAMILIES_WITH_TENSORS)


def test_the_head_of_gpt_neox_has_the_name_of_either_version_of_transformers(tmp_path: Path) -> None:
    config = LLAMA | {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    old = complete_weights(0, config)
    new = {name.replace("embed_out", "lm_head"): weight for name, weight in old.items()}
    assert old.keys() != new.keys()
    for name, weights in (("old", old), ("new", new)):
        model = write_model(tmp_path / name, weights, config)
        convert(model, tmp_path / f"{name}-out", to="huggingface", verify=True)
        assert load_file(tmp_path / f"{name}-out/model.safetensors").keys() == weights.keys()
    neither = write_model(tmp_path / "neither", lacking(old, "embed_out"), config)
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'embed_out\.weight'"):
        convert(neither, tmp_path / "not", to="huggingface")


WRITE: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda model, out: merge(out, [(model, 1.0), (model, 2.0)]),
    "huggingface": lambda model, out: convert(model, out, to="huggingface"),
    "megatron": lambda model, out: convert(model, out, to="megatron"),
    "deepspeed": lambda model, out: convert(model, out, to="deepspeed"),
    "pretrained": lambda model, out: require_trainable(model),
}


@pytest.mark.parametrize("write", WRITE.values(), ids=WRITE)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: lacking(weights, "layers.1.mlp"), "lacks the tensor 'model.layers.1.mlp.down_proj.weight'"),
        (lambda weights: lacking(weights, "lm_head"), "lacks the tensor 'lm_head.weight'"),
        (
            lambda weights: weights | {"model.layers.2.input_layernorm.weight": torch.ones(32)},
            "has an unexpected tensor 'model.layers.2.input_layernorm.weight'",
        ),
        (
            lambda weights: weights | {"model.embed_tokens.weight": torch.ones(64, 32)},
            r"'model.embed_tokens.weight' \[64, 32\] does not fit config.json",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_not_written(
    write: Callable[[Path, Path], object], change: Callable[..., Any], message: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", change(complete_weights(0)))
    with pytest.raises(CheckpointError, match=message):
        write(model, tmp_path / "out")
    assert re.search(message, str(inspect(model).problem))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_settings_that_add_biases_and_buffers_of_older_versions_are_no_surplus(tmp_path: Path) -> None:
    config = LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    weights = complete_weights(0, config) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model = write_model(tmp_path / "model", weights, config)
    convert(model, tmp_path / "out", to="huggingface", verify=True)


def test_files_of_the_base_class_need_no_prefix_and_other_classes_no_head(tmp_path: Path) -> None:
    weights = lacking(complete_weights(0), "lm_head")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    model = write_model(tmp_path / "encoder", bare, LLAMA | {"architectures": ["LlamaModel"]})
    merge(tmp_path / "out", [(model, 1.0), (model, 1.0)])
    assert load_file(tmp_path / "out/model.safetensors").keys() == bare.keys()
    del bare["layers.1.input_layernorm.weight"]
    shorter = write_model(tmp_path / "shorter", bare, LLAMA | {"architectures": ["LlamaModel"]})
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'layers\.1\.input_layernorm\.weight'"):
        merge(tmp_path / "not", [(shorter, 1.0)])


@pytest.mark.parametrize("missing", [[1], [0], [3]], ids=["in between", "first", "last"])
def test_layers_that_an_unknown_family_lacks_are_reported(missing: list[int], tmp_path: Path) -> None:
    weights = {f"backbone.layers.{i}.mixer.weight": torch.ones(2) for i in range(4) if i not in missing}
    model = write_model(tmp_path / "model", weights, {"model_type": "mamba", "num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=rf"lacks layers of 'backbone\.layers\.': {missing[0]}, of 4\."):
        merge(tmp_path / "out", [(model, 1.0)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 1 << 30}, {"hidden_size": "x", "num_attention_heads": 1 << 30}]
)
@pytest.mark.parametrize("family", ["olmo2", "mixtral", "gpt_neox"])
def test_sizes_of_no_model_take_no_memory(family: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    config = LLAMA | {"model_type": family, "num_local_experts": 1 << 30} | sizes
    assert expected_tensors(config) is None
    model = write_model(tmp_path / "model", {"model.layers.0.mlp.weight": torch.ones(2)}, config)
    with pytest.raises(CheckpointError, match=r"lacks layers|must be a number from 0"):
        merge(tmp_path / "out", [(model, 1.0)])


def test_layers_without_weights_between_others_are_no_gap(tmp_path: Path) -> None:
    weights = {f"projector.layers.{i}.linear.weight": torch.ones(2) for i in (0, 2, 4)}
    weights |= {f"projector.blocks.{i}.weight": torch.ones(2) for i in (0, 3)}
    weights |= {f"model.layers.{i}.mlp.weight": torch.ones(2) for i in range(3)}  # the last predicts further tokens
    model = write_model(tmp_path / "model", weights, {"model_type": "new", "num_hidden_layers": 2})
    merge(tmp_path / "out", [(model, 1.0)])


@pytest.mark.parametrize(
    "prefix", ["module.", "_forward_module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "model."]
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_names_behind_the_prefix_of_a_wrapper_are_those_of_the_model(prefix: str, file: str, tmp_path: Path) -> None:
    weights = complete_weights(0)
    model = write_model(tmp_path / "model", {prefix + name: weight for name, weight in weights.items()})
    if file.endswith(".bin"):
        (model / "model.safetensors").unlink()
        torch.save({prefix + name: weight for name, weight in weights.items()}, model / file)
    convert(model, tmp_path / "out", to="huggingface", verify=True)
    written = load_file(tmp_path / "out/model.safetensors")
    assert written.keys() == weights.keys()
    assert all(written[name].equal(weights[name]) for name in weights)


def test_a_prefix_that_only_some_names_have_is_not_guessed(tmp_path: Path) -> None:
    weights = complete_weights(0)
    mixed = {name if "layers.1" in name else f"module.{name}": weight for name, weight in weights.items()}
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        merge(tmp_path / "out", [(write_model(tmp_path / "mixed", mixed), 1.0)])
    twice = weights | {f"_orig_mod.{name}": weight.clone() for name, weight in weights.items()}
    with pytest.raises(CheckpointError, match="which are one tensor without the prefixes of wrappers"):
        merge(tmp_path / "out", [(write_model(tmp_path / "twice", twice), 1.0)])


def test_names_inside_peft_are_those_of_the_model_unless_matrices_are_left(tmp_path: Path) -> None:
    weights = complete_weights(0)
    inside = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    model = write_model(tmp_path / "model", inside)
    convert(model, tmp_path / "out", to="huggingface", verify=True)
    assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    inside[f"{name}.base_layer.weight"] = inside.pop(f"{name}.weight")
    inside |= {f"{name}.lora_{side}.default.weight": torch.ones(2, 2) for side in "AB"}
    model = write_model(tmp_path / "trained", inside)
    for call in (lambda: convert(model, tmp_path / "no", to="huggingface"), lambda: inspect(model)):
        with pytest.raises(
            CheckpointError, match=r"is the state dict of a PEFT model with unmerged .*call merge_and_unload\(\)"
        ):
            call()


def test_a_model_with_a_value_head_around_it_keeps_both(tmp_path: Path) -> None:
    weights = complete_weights(0)
    inside = {f"pretrained_model.{name}": tensor for name, tensor in weights.items()}
    model = write_model(tmp_path / "model", inside | {"v_head.summary.weight": torch.ones(1, 32)})
    convert(model, tmp_path / "out", to="huggingface", verify=True)
    assert load_file(tmp_path / "out/model.safetensors").keys() == {*weights, "v_head.summary.weight"}
    with pytest.raises(CheckpointError, match=r"has a value head .* Save the model without it"):
        convert(model, tmp_path / "no", to="megatron")


def test_empty_tensors_that_zero_3_leaves_are_no_weights(tmp_path: Path) -> None:
    empty = {name: torch.zeros(0, dtype=torch.bfloat16) for name in complete_weights(0)}
    for config in (LLAMA, {"model_type": "other"}):
        model = write_model(tmp_path / str(config["model_type"]), empty, config)
        with pytest.raises(
            CheckpointError, match=r"has no values for .*ZeRO 3 leaves empty tensors.*\(global_step\*\)"
        ):
            convert(model, tmp_path / "out", to="huggingface")
        assert inspect(model).converts_to == ()
    # Beside a complete set, as accelerate may leave one.
    model = tmp_path / "llama"
    torch.save(complete_weights(0), model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"also has pytorch_model\.bin: move model\.safetensors away"):
        convert(model, tmp_path / "out", to="huggingface")
    (model / "model.safetensors").unlink()
    convert(model, tmp_path / "out", to="huggingface")


def test_layers_inside_a_wrapper_are_those_of_the_model(tmp_path: Path) -> None:
    weights = complete_weights(0)
    wrapped = {re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): one for name, one in weights.items()}
    merge(tmp_path / "out", [(write_model(tmp_path / "model", wrapped), 1.0)])
    assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "the weights of a mixture of experts"),
        ("layer_03-model_00-model_states.pt", "the layers of a pipeline-parallel model"),
    ],
)
def test_a_file_of_a_deepspeed_checkpoint_that_is_not_read_is_an_error(name: str, what: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", complete_weights(0))
    convert(model, tmp_path / "there", to="deepspeed")
    convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    torch.save({}, tmp_path / "there/global_step0" / name)
    with pytest.raises(CheckpointError, match=f"has {what}: '{name}'. A checkpoint is read completely or not at"):
        convert(tmp_path / "there", tmp_path / "again", to="huggingface")
    assert not (tmp_path / "again").exists()


@pytest.fixture
def two_sets(tmp_path: Path) -> Path:
    """A folder with a single file, an index of shards that are gone, and a .bin with other values."""
    folder = write_model(tmp_path / "two", complete_weights(0))
    index = {"metadata": {}, "weight_map": dict.fromkeys(complete_weights(0), "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(complete_weights(1), folder / "pytorch_model.bin")
    return folder


def test_the_weights_are_those_that_transformers_loads(two_sets: Path, tmp_path: Path) -> None:
    done = convert(two_sets, tmp_path / "out", to="huggingface", verify=True)
    read = "model.safetensors, and not model.safetensors.index.json, pytorch_model.bin"
    assert done.weights == inspect(two_sets).weights == read
    written = load_file(tmp_path / "out/model.safetensors")
    assert written["model.norm.weight"].equal(complete_weights(0)["model.norm.weight"])
    assert merge(tmp_path / "mean", [(two_sets, 1.0)]).weights == {str(two_sets): read}


def test_a_single_bin_file_is_read_before_an_index_of_shards(two_sets: Path, tmp_path: Path) -> None:
    for file in two_sets.glob("model.*"):
        file.unlink()
    index = {"weight_map": dict.fromkeys(complete_weights(0), "pytorch_model-00001-of-00002.bin")}
    (two_sets / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(two_sets, tmp_path / "out", to="huggingface")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written["model.norm.weight"].equal(complete_weights(1)["model.norm.weight"])


def test_verification_does_not_trust_the_reader_that_was_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", complete_weights(0))
    read = SafetensorsModel.read_into

    def wrong(self: SafetensorsModel, name: str, start: int, out: torch.Tensor) -> None:
        read(self, name, start, out)
        out[0] = 7 if name == "model.norm.weight" else out[0]

    monkeypatch.setattr(SafetensorsModel, "read_into", wrong)
    convert(model, tmp_path / "trusted", to="huggingface")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' in .* differs from"):
        convert(model, tmp_path / "out", to="huggingface", verify=True)
    assert not (tmp_path / "out").exists()


def test_a_head_that_differs_from_its_tied_embedding_is_kept(tmp_path: Path) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    model = write_model(tmp_path / "model", complete_weights(0, LLAMA), tied)
    same = complete_weights(0, LLAMA)
    same["lm_head.weight"] = same["model.embed_tokens.weight"].clone()
    copied = write_model(tmp_path / "copied", same, tied)
    for source, names in ((model, 1), (copied, 0)):
        convert(source, tmp_path / f"{source.name}-out", to="huggingface", verify=True)
        written = load_file(tmp_path / f"{source.name}-out/model.safetensors")
        assert [*written].count("lm_head.weight") == names
        config = json.loads((tmp_path / f"{source.name}-out/config.json").read_text())
        assert config["tie_word_embeddings"] is (names == 0)
    with pytest.raises(CheckpointError, match=r"ties its embeddings in config\.json, but its LM head has other values"):
        convert(model, tmp_path / "megatron", to="megatron")
    with pytest.raises(CheckpointError, match="ties its embeddings"):
        require_trainable(model)
    shutil.rmtree(tmp_path / "copied-out")
    save_file(same | {"lm_head.weight": torch.ones(65, 32)}, copied / "model.safetensors")
    convert(copied, tmp_path / "copied-out", to="huggingface")
    assert load_file(tmp_path / "copied-out/model.safetensors")["lm_head.weight"].float().mean() == 1
