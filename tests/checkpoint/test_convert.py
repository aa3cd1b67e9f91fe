from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.small_models import HUGGINGFACE_SIZES
from helpers.worlds import run_script
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.convert import convert, verify_equal
from btm_scale.checkpoint.formats.megatron import find_shape
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.journal import only_merge_into
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_names import cut, from_huggingface, table
from btm_scale.run_dir import RunDir
from btm_scale.util.files import partial_path

LLAMA = HUGGINGFACE_SIZES | {"max_position_embeddings": 16, "rms_norm_eps": 1e-5}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 16, "vocab_size": 65}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied": LLAMA | {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": LLAMA | {"model_type": "llama", "tie_word_embeddings": False},
    "mistral": LLAMA | {"model_type": "mistral", "head_dim": 12},
    "qwen2": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gpt2": GPT2 | {"model_type": "gpt2"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that transformers initialized and saved."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}
    for family, settings in FAMILIES.items():
        torch.manual_seed(5)
        original = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in original.parameters():  # otherwise biases are 0 and norm weights 1
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        folders[family] = folder = tmp_path_factory.mktemp(family)
        original.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
    return folders


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


@pytest.mark.parametrize("to", ["megatron", "deepspeed"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_round_trip_restores_the_same_model(model: Path, tmp_path: Path, to: str, tensor: int) -> None:
    convert(model, tmp_path / "there", to=to, tensor=tensor, verify=True)
    convert(tmp_path / "there", tmp_path / "back", to="huggingface", verify=True)
    assert content_hash(tmp_path / "back") == content_hash(model)
    assert (tmp_path / "back/tokenizer.json").read_text() == "{}"
    described = inspect(tmp_path / "there")
    assert described.format == {"megatron": "torch_dist", "deepspeed": "deepspeed"}[to]
    assert described.parameters == sum(spec.elements for spec in SafetensorsModel(model).specs().values())
    assert described.converts_to == ("huggingface", "megatron", "deepspeed")
    assert described.tensor_degrees == ((1, 2) if described.family != "gpt2" else (1, 2, 4))


def test_a_round_trip_gives_the_same_logits_in_transformers(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(model, tmp_path / "there", to="megatron", tensor=2)
    convert(tmp_path / "there", tmp_path / "back", to="huggingface", dtype="float32")
    tokens = torch.arange(12)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        for folder in (model, tmp_path / "back")
    ]
    assert logits[0].equal(logits[1])
    assert json.loads((tmp_path / "back/config.json").read_text()).get("dtype") == "float32"


def test_verification_detects_one_flipped_bit(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "copy", to="huggingface")
    verify_equal(model, tmp_path / "copy", None)
    file = tmp_path / "copy/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="differs from"):
        verify_equal(model, tmp_path / "copy", None)


def test_an_impossible_conversion_raises_and_leaves_no_files(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"over tensor=3\. tensor must divide .* use one of 1, 2"):
        convert(model, tmp_path / "out", to="megatron", tensor=3)
    with pytest.raises(CheckpointError, match="Unknown format 'gguf'"):
        convert(model, tmp_path / "out", to="gguf")
    with pytest.raises(CheckpointError, match="already exists"):
        convert(model, model, to="huggingface")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["huggingface", "megatron", "deepspeed"])
def test_free_space_is_checked_for_the_output_dtype(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    size = sum(spec.nbytes for spec in SafetensorsModel(models["mistral"]).specs().values())
    usage = shutil.disk_usage(tmp_path)._replace(free=size * 3 // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="Nothing was written"):
        convert(models["mistral"], tmp_path / "out", to=to, dtype="float32")


@pytest.mark.parametrize("to", ["huggingface", "megatron", "deepspeed"])
def test_two_conversions_into_one_target_do_not_mix(models: dict[str, Path], tmp_path: Path, to: str) -> None:
    partial = partial_path(tmp_path / "out")
    partial.mkdir()
    (partial / "begun").touch()
    with only_merge_into(partial), pytest.raises(CheckpointError, match="Another process is writing"):
        convert(models["mistral"], tmp_path / "out", to=to)
    assert (partial / "begun").exists()
    convert(models["mistral"], tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "has an unexpected tensor 'model.layers.1.input_layernorm.weight'"),
        ({"num_hidden_layers": 3}, "lacks the tensor 'model.layers.2.input_layernorm.weight'"),
        ({"tie_word_embeddings": True, "model_type": "qwen2"}, "lacks the tensor '.*k_proj.bias'"),
        ({"vocab_size": 60}, r"embed_tokens.weight' \[65, 32\] does not fit config.json"),
        ({"vocab_size": 70}, r"embed_tokens.weight' \[65, 32\] does not fit config.json"),
        ({"num_attention_heads": 8}, "q_proj.weight' .* does not fit config.json"),
    ],
)
def test_a_config_of_a_different_model_raises_before_anything_is_written(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(models["llama-untied"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"head_dim": 8} | change))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "model", tmp_path / "out", to="megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_causal_masks_and_tied_heads_in_old_gpt2_files_are_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["gpt2"], tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
    weights |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    save_file(weights, tmp_path / "model/model.safetensors")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    convert(tmp_path / "model", tmp_path / "there", to="deepspeed", verify=True)
    convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    assert content_hash(tmp_path / "back") == content_hash(models["gpt2"])


def test_published_gpt2_files_without_the_prefix_are_converted(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["gpt2"], tmp_path / "model")
    weights = load_file(models["gpt2"] / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "model/model.safetensors")
    for to in ("megatron", "deepspeed"):
        convert(tmp_path / "model", tmp_path / to, to=to, verify=True)
        convert(tmp_path / to, tmp_path / f"back-from-{to}", to="huggingface")
        assert content_hash(tmp_path / f"back-from-{to}") == content_hash(models["gpt2"])


def test_inspect_describes_a_model_from_its_headers(model: Path) -> None:
    described = inspect(model)
    assert described.format == "safetensors"
    assert described.family == json.loads((model / "config.json").read_text())["model_type"]
    assert described.dtypes == {"bfloat16": described.parameters}
    assert described.step is None
    with open_model(model) as reader:
        assert described.tensors == len(reader.names)
    assert list(described.files.values()) == [(model / "model.safetensors").stat().st_size]


def test_a_megatron_folder_with_several_iterations_opens_the_latest(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "megatron/iter_0000012"
    folder.parent.mkdir()
    convert(models["qwen3"], folder, to="megatron")
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("12\n")
    assert inspect(folder.parent).step == 12
    convert(folder.parent, tmp_path / "back", to="huggingface")
    assert content_hash(tmp_path / "back") == content_hash(models["qwen3"])
    assert (tmp_path / "back/config.json").is_file()


def test_a_training_checkpoint_reads_as_a_model_of_its_master_weights(models: dict[str, Path], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(models["qwen2"], run.model("math"))
    with SafetensorsModel(models["qwen2"]) as model:
        masters = {name: model.read(name).float() + 1e-4 for name in model.names}
    state = run.checkpoints("math") / "step-00000007"
    state.mkdir(parents=True)
    tensors = {f"{kind}/{name}": tensor.clone() for name, tensor in masters.items() for kind in ("master", "exp_avg")}
    save_file(tensors, state / "model.safetensors")
    (state / "state.json").write_text(json.dumps({"step": 7}))
    described = inspect(state)
    assert (described.format, described.step, described.family) == ("training state", 7, "qwen2")
    assert described.parameters == sum(tensor.numel() for tensor in masters.values())
    convert(state, tmp_path / "parts", to="megatron", tensor=2, verify=True)
    merge(tmp_path / "merged", [(state, 1.0), (tmp_path / "parts", 1.0)])
    merged = SafetensorsModel(tmp_path / "merged")
    assert merged.names == tuple(sorted(masters))
    assert all(merged.read(name).equal(tensor) for name, tensor in masters.items())
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"
    shutil.copy(models["qwen3"] / "config.json", state)
    with pytest.raises(CheckpointError, match="does not describe the model"):
        open_model(state)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [full(1), 2])
def test_the_engine_loads_converted_model_states(models: dict[str, Path], tmp_path: Path, tensor: int) -> None:
    spec = []
    for family, folder in models.items():
        convert(folder, tmp_path / family, to="deepspeed", tensor=tensor)
        shape = find_shape(folder).model_dump()
        spec.append({"tensor": tensor, "folder": str(tmp_path / family), "shape": shape})
    run_script(Path(__file__).with_name("load_with_engine.py"), spec, tmp_path)
    for family, folder in models.items():
        shape = find_shape(folder)
        with open_model(folder) as reader:
            for rank in range(tensor):
                loaded = load_file(tmp_path / family / f"loaded-{rank}.safetensors")
                rows = -(-shape.vocabulary // tensor) * tensor
                for entry in table(shape):
                    expected = cut(entry, from_huggingface(entry, reader.read, shape, rows), tensor)[rank]
                    assert loaded[entry.megatron].equal(expected), f"{family}: {entry.megatron}"
