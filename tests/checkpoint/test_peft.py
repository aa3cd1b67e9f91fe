"""Adapters that PEFT saved, read with their base as the model that PEFT merges them into."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge, merge_by_recipe
from btm_scale.errors import CheckpointError

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    ),
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16),
}
ATTENTION_AND_MLP = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION_AND_MLP}),
    "rank-stabilised": ("llama", {"target_modules": ATTENTION_AND_MLP, "use_rslora": True}),
    "ranks-and-alphas-per-module": (
        "llama",
        {
            "target_modules": ATTENTION_AND_MLP,
            "rank_pattern": {"down_proj": 8, r"layers\.1\..*\.q_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "q_proj": 7},
        },
    ),
    "saved-modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "all-biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "biases-of-matrices": ("gpt2", {"target_modules": ["c_proj"], "lora_bias": True, "fan_in_fan_out": True}),
}
Adapter = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")


def model_of(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family], dtype=dtype)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """Train an adapter a little: `adapter(family, settings)` returns its folder and its base's."""

    def save(
        family: str, settings: dict[str, Any] | PeftConfig, *, dtype: torch.dtype = torch.float32
    ) -> tuple[Path, Path]:
        base = tmp_path / "base"
        model_of(family, dtype=dtype).save_pretrained(base)
        config = settings if isinstance(settings, PeftConfig) else LoraConfig(**{"r": 4, "lora_alpha": 6} | settings)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", base

    return save


def merged_by_peft(adapter: Path, base: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    return dict(model.merge_and_unload().state_dict())


def edit(adapter: Path, **settings: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_read_as_the_model_that_peft_merges_it_into(adapter: Adapter, kind: str) -> None:
    folder, base = adapter(*ADAPTERS[kind])
    expected = merged_by_peft(folder, base)
    with open_model(folder) as model, open_model(base) as alone:
        changed = [name for name in model.names if not model.read(name).equal(alone.read(name))]
        assert changed
        assert model.names == alone.names
        for name in model.names:
            torch.testing.assert_close(model.read(name), expected[name].detach(), rtol=1e-6, atol=1e-7)


def test_a_16_bit_base_is_rounded_once(adapter: Adapter) -> None:
    folder, base = adapter("llama", {"target_modules": ["q_proj"]}, dtype=torch.bfloat16)
    saved, original = load_file(folder / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (saved[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    with open_model(folder) as model:
        exact = original[f"{name}.weight"].double() + (b @ a) * (6 / 4)
        assert model.read(f"{name}.weight").equal(exact.to(torch.bfloat16))


def test_every_range_of_a_tensor_has_the_bits_of_the_complete_tensor(
    adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btm_scale.checkpoint.formats.peft._BLOCK_ELEMENTS", 100)  # three rows
    folder, _ = adapter(*ADAPTERS["conv1d"])
    with open_model(folder) as model:
        for name in model.names:
            flat = model.read(name).reshape(-1)
            for start in range(0, flat.numel(), 333):
                stop = min(start + 777, flat.numel())
                assert model.read_range(name, start, stop).equal(flat[start:stop])


def test_an_adapter_is_converted_and_merged_like_the_complete_model(adapter: Adapter, tmp_path: Path) -> None:
    folder, base = adapter(*ADAPTERS["ranks-and-alphas-per-module"])
    convert(folder, tmp_path / "complete", to="huggingface", verify=True)
    convert(folder, tmp_path / "megatron", to="megatron", verify=True)
    one = merge(tmp_path / "one", [(folder, 0.3), (base, 0.7)])
    other = merge(tmp_path / "other", [(tmp_path / "complete", 0.3), (base, 0.7)])
    assert one.content_hash == other.content_hash
    merge(tmp_path / "given", [(folder, 0.3), (base, 0.7)], base=base)
    again = merge_by_recipe(tmp_path / "again", tmp_path / "given/merge_recipe.yaml")
    assert again.content_hash == one.content_hash
    tokens = torch.arange(12).reshape(1, 12)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "complete")
    original = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, original(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_original_of_a_module_that_was_saved_in_full_is_not_used(adapter: Adapter, tmp_path: Path) -> None:
    folder, _ = adapter("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    convert(folder, tmp_path / "without", to="huggingface")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    head = tensors["base_model.model.lm_head.weight"]
    save_file(tensors | {"base_model.model.lm_head.original_module.weight": torch.zeros_like(head)}, file)
    convert(folder, tmp_path / "with", to="huggingface")
    assert content_hash(tmp_path / "with") == content_hash(tmp_path / "without")


def test_rows_for_added_tokens_beside_an_adapter_are_refused(adapter: Adapter, tmp_path: Path) -> None:
    folder, _ = adapter("llama", {"target_modules": ["q_proj"]})
    save_file({"input_embeddings": torch.zeros(4, 32)}, folder / "new_embeddings.safetensors")
    with pytest.raises(CheckpointError, match=r"rows for added tokens in new_embeddings\.safetensors"):
        convert(folder, tmp_path / "out", to="huggingface")


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_a_tied_matrix_with_a_product_of_its_own_is_untied(adapter: Adapter, tmp_path: Path, target: str) -> None:
    folder, base = adapter("gpt2", {"target_modules": [target]})
    convert(folder, tmp_path / "complete", to="huggingface", verify=True)
    written = load_file(tmp_path / "complete/model.safetensors")
    original = load_file(base / "model.safetensors")["transformer.wte.weight"]
    trained, other = ("lm_head.weight", "transformer.wte.weight")[:: 1 if target == "lm_head" else -1]
    assert written[other].equal(original)
    assert not written[trained].equal(original)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "complete")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saved", ["lm_head", "wte"])
def test_a_tied_matrix_that_was_trained_alone_is_untied(adapter: Adapter, tmp_path: Path, saved: str) -> None:
    settings = {"target_modules": ["c_attn"], "modules_to_save": [saved], "fan_in_fan_out": True}
    folder, base = adapter("gpt2", settings)
    original = load_file(base / "model.safetensors")["transformer.wte.weight"]
    trained = next(
        tensor
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
        if name.endswith(f"{saved}.weight")
    )
    convert(folder, tmp_path / "complete", to="huggingface", verify=True)
    written = load_file(tmp_path / "complete/model.safetensors")
    assert not trained.equal(original)
    assert written["lm_head.weight"].equal(trained if saved == "lm_head" else original)
    assert written["transformer.wte.weight"].equal(trained if saved == "wte" else original)
    assert not json.loads((tmp_path / "complete/config.json").read_text())["tie_word_embeddings"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "complete")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


def test_a_base_that_is_given_replaces_the_name_in_the_adapter(adapter: Adapter, tmp_path: Path) -> None:
    folder, base = adapter(*ADAPTERS["plain"])
    expected = merged_by_peft(folder, base)
    edit(folder, base_model_name_or_path="someone/a-model-of-the-hub")
    with pytest.raises(CheckpointError, match=r"adapter of 'someone/a-model-of-the-hub'.*--base"):
        convert(folder, tmp_path / "out", to="huggingface")
    convert(folder, tmp_path / "out", to="huggingface", base=base, verify=True)
    written = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-6, atol=1e-7)
    # With a method that takes a base, the same base completes the adapter; also in other processes.
    report = merge(tmp_path / "arithmetic", [(folder, 1.0)], method="task_arithmetic", base=base, jobs=2)
    assert report.tensors == len(written)
    for name, tensor in load_file(tmp_path / "arithmetic/model.safetensors").items():
        torch.testing.assert_close(tensor, written[name], rtol=1e-6, atol=1e-7)
    assert merge(tmp_path / "linear", [(folder, 0.5), (base, 0.5)], base=base).tensors == len(written)


def test_a_complete_model_takes_no_base(adapter: Adapter, tmp_path: Path) -> None:
    _, base = adapter(*ADAPTERS["plain"])
    with pytest.raises(CheckpointError, match="takes no base"):
        convert(base, tmp_path / "out", to="huggingface", base=base)


def test_an_adapter_is_inspected_as_one(adapter: Adapter) -> None:
    folder, base = adapter(*ADAPTERS["plain"])
    facts, alone = inspect(folder), inspect(base)
    assert (facts.format, facts.family, facts.problem) == ("adapter", "llama", None)
    assert (facts.parameters, facts.converts_to) == (alone.parameters, alone.converts_to)
    assert list(facts.files) == ["adapter/adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "'use_dora'"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "'target_parameters'"),
        ({"trainable_token_indices": [1, 2]}, "'trainable_token_indices'"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "'layer_replication'"),
    ],
)
def test_other_kinds_of_lora_are_refused_by_name(adapter: Adapter, settings: dict[str, Any], reason: str) -> None:
    folder, _ = adapter("llama", {"target_modules": ["q_proj"]} | settings)
    with pytest.raises(CheckpointError, match=reason):
        open_model(folder)


def test_other_kinds_of_adapters_are_refused_by_name(adapter: Adapter) -> None:
    folder, _ = adapter("llama", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(CheckpointError, match="is of type 'IA3'"):
        open_model(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 5}, "rank 5, but its matrices have rank 4"),
        ({"lora_alpha": "6"}, "'lora_alpha' must be a finite number"),
        ({"rank_pattern": {"(x*)*": 4}}, "At most 2 repetitions"),
        ({"alpha_pattern": {"[": 4}}, "not a regular expression"),
        ({"modules_to_save": "lm_head"}, "must list names"),
        ({"a_new_kind": 1}, "'a_new_kind'"),
    ],
)
def test_a_damaged_config_of_an_adapter_is_refused(adapter: Adapter, change: dict[str, Any], reason: str) -> None:
    folder, _ = adapter("llama", {"target_modules": ["q_proj"]})
    edit(folder, **change)
    with pytest.raises(CheckpointError, match=reason):
        open_model(folder)


def test_tensors_that_do_not_fit_the_base_are_refused(adapter: Adapter) -> None:
    folder, base = adapter("llama", {"target_modules": ["q_proj"]})
    file = folder / "adapter_model.safetensors"
    good = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, reason in (
        ({name: tensor for name, tensor in good.items() if name != key}, "has only"),
        (good | {key: torch.zeros(4, 31)}, "for 'model.layers.0.self_attn.q_proj.weight'"),
        (good | {"base_model.model.model.other.weight": torch.zeros(4)}, "'model.other.weight', which the base lacks"),
        (good | {key.replace("lora_A", "lora_magnitude_vector"): torch.zeros(4)}, "which plain LoRA has not"),
        (good | {key: torch.zeros(4, 32, dtype=torch.int32)}, "dtype that is not a float"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=reason):
            open_model(folder)
    save_file(good, file)
    edit(folder, base_model_name_or_path=str(folder))
    with pytest.raises(CheckpointError, match="must be a complete model"):
        open_model(folder)
    save_file(load_file(base / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="only one of them can be meant"):
        open_model(folder)
