"""Models of one shape, merged into a mixture of experts whose experts are their MLPs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import HUGGINGFACE_SIZES
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.completeness import problems_of
from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge import workers
from btm_scale.checkpoint.merge.merge import merge, merge_by_recipe
from btm_scale.checkpoint.merge.moe import Ingredients, names_of
from btm_scale.cli.app import main
from btm_scale.config.model import ModelConfig
from btm_scale.errors import CheckpointError

SIZES: dict[str, Any] = HUGGINGFACE_SIZES | {"max_position_embeddings": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 12},
    "mistral": {"sliding_window": 5, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 20, "tie_word_embeddings": True},
}


def save_random(folder: Path, seed: int, family: str = "llama", **changes: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"model_type": family, **SIZES, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    return {family: [save_random(folder / f"{family}{i}", i, family) for i in range(3)] for family in FAMILIES}


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values()), "every tensor of the file is one of the model, and the other way round"
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_several_times_one_expert_is_that_expert_whatever_the_router(
    models: dict[str, list[Path]], family: str, tmp_path: Path
) -> None:
    expert = models[family][0]
    tokens = torch.randint(0, 65, (2, 20))
    merge(tmp_path / "moe", [(expert, 1.0)] * 3, method="moe", random_seed=7)
    torch.testing.assert_close(logits(tmp_path / "moe", tokens), logits(expert, tokens), atol=1e-5, rtol=0)


SHARED = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"tie_word_embeddings": True}}


@pytest.mark.parametrize("family", SHARED)
def test_several_times_one_expert_that_is_also_shared_is_that_expert(family: str, tmp_path: Path) -> None:
    expert = save_random(tmp_path / "expert", 0, family, **SHARED[family])
    tokens = torch.randint(0, 65, (2, 20))
    shared = Ingredients(("a", "b", "c"), shared_expert=expert)
    merge(tmp_path / "moe", [(expert, 1.0)] * 3, method="moe", random_seed=7, ingredients=shared)
    assert json.loads((tmp_path / "moe/config.json").read_text())["architectures"] == ["Qwen2MoeForCausalLM"]
    torch.testing.assert_close(logits(tmp_path / "moe", tokens), logits(expert, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_of_each_layer_is_the_shared_experts_and_the_rest_is_averaged_without_it(
    models: dict[str, list[Path]], dtype: str, tmp_path: Path
) -> None:
    *experts, seed = models["llama"]
    inputs = [(path, 1.0) for path in experts]
    shared = Ingredients(("a", "b"), shared_expert=seed)
    report = merge(tmp_path / "moe", inputs, method="moe", dtype=dtype, ingredients=shared)
    merge(tmp_path / "mean", inputs, dtype=dtype)
    mixture, mean = load_file(tmp_path / "moe/model.safetensors"), load_file(tmp_path / "mean/model.safetensors")
    for path, place, factor in (
        (experts[0], "experts.0", 0.5),
        (experts[1], "experts.1", 0.5),
        (seed, "shared_expert", 1),
    ):
        theirs = load_file(path / "model.safetensors")
        for part, scale in (("gate_proj", 1), ("up_proj", 1), ("down_proj", factor)):
            expected = theirs[f"model.layers.1.mlp.{part}.weight"].to(mean["model.norm.weight"].dtype) * scale
            assert mixture[f"model.layers.1.mlp.{place}.{part}.weight"].equal(expected)
    rest = {name: tensor for name, tensor in mixture.items() if ".mlp." not in name}
    added = [tensor for name, tensor in mixture.items() if name.endswith((".bias", "shared_expert_gate.weight"))]
    assert len(added) == 2 * 4
    assert not any(tensor.count_nonzero() for tensor in added)
    assert all(tensor.equal(mean[name]) for name, tensor in rest.items() if not name.endswith(".bias"))
    again = merge(tmp_path / "moe", inputs, method="moe", dtype=dtype, ingredients=shared)
    assert again.already_complete
    assert again.content_hash == report.content_hash
    others = Ingredients(("a", "b"), shared_expert=experts[0])
    with pytest.raises(CheckpointError, match="already exists"):
        merge(tmp_path / "moe", inputs, method="moe", dtype=dtype, ingredients=others)


def test_transformers_keeps_names_and_bits_of_a_mixture_with_a_shared_expert(
    models: dict[str, list[Path]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    shared = Ingredients(("a", "b"), shared_expert=models["llama"][2])
    merge(tmp_path / "moe", [(path, 1.0) for path in models["llama"][:2]], method="moe", ingredients=shared)
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    facts = inspect(tmp_path / "moe")
    assert (facts.family, facts.problem, facts.converts_to) == ("qwen2_moe", None, ("huggingface",))


@pytest.mark.parametrize("family", FAMILIES)
def test_mlps_are_copied_in_the_order_of_the_inputs_and_the_rest_is_averaged(
    models: dict[str, list[Path]], family: str, tmp_path: Path
) -> None:
    inputs = [(path, 1.0) for path in models[family]]
    merge(tmp_path / "moe", inputs, method="moe")
    merge(tmp_path / "mean", inputs)
    mixture, mean = load_file(tmp_path / "moe/model.safetensors"), load_file(tmp_path / "mean/model.safetensors")
    layer = "model.layers.1."
    block, names = ("mlp.", ("gate_proj", "up_proj", "down_proj"))
    if family != "qwen3":
        block, names = "block_sparse_moe.", ("w1", "w3", "w2")
    for number, path in enumerate(models[family]):
        expert = load_file(path / "model.safetensors")
        for name, theirs in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
            ours = mixture.pop(f"{layer}{block}experts.{number}.{name}.weight")
            assert ours.equal(expert[f"{layer}mlp.{theirs}.weight"])
    for name, tensor in mixture.items():
        if name == "lm_head.weight":
            assert tensor.equal(mean.get(name, mean["model.embed_tokens.weight"]))
        elif ".experts." not in name and "gate.weight" not in name:
            assert tensor.equal(mean[name]), name
    assert mixture["lm_head.weight"].shape == (65, 32)
    assert json.loads((tmp_path / "moe/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_models_have_in_common_is_kept_bit_for_bit(
    models: dict[str, list[Path]], dtype: torch.dtype, tmp_path: Path
) -> None:
    seed = {name: tensor.to(dtype) for name, tensor in load_file(models["llama"][0] / "model.safetensors").items()}
    for number in range(3):
        folder = tmp_path / f"expert{number}"
        shutil.copytree(models["llama"][0], folder)
        changed = {name: tensor + number if ".mlp." in name else tensor for name, tensor in seed.items()}
        save_file(changed, folder / "model.safetensors")
    merge(tmp_path / "moe", [(tmp_path / f"expert{number}", 1.0) for number in range(3)], method="moe")
    mixture = load_file(tmp_path / "moe/model.safetensors")
    assert all(mixture[name].equal(tensor) for name, tensor in seed.items() if ".mlp." not in name)
    assert {tensor.dtype for tensor in mixture.values()} == {dtype}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_keeps_names_and_bits_of_a_mixture(
    models: dict[str, list[Path]], family: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    merge(tmp_path / "moe", [(path, 1.0) for path in models[family]], method="moe", parameters={"top_k": 1})
    AutoModelForCausalLM.from_pretrained(tmp_path / "moe").save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "again"))
    assert ours.keys() == theirs.keys()
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["num_experts_per_tok"], config["expert_names"]) == (1, [f"{family}{i}" for i in range(3)])


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.full)])
def test_processes_pieces_and_order_do_not_change_a_byte(
    models: dict[str, list[Path]], jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [(path, 1.0) for path in models["llama"]]
    merge(tmp_path / "one", inputs, method="moe", jobs=1)
    monkeypatch.setattr(workers, "torch_is_loaded", lambda: False)  # as in a command
    merge(tmp_path / "two", inputs, method="moe", jobs=jobs, chunk_bytes=256)
    merge(tmp_path / "turned", inputs[::-1], method="moe", jobs=1)
    one, two, turned = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "turned"))
    assert all(tensor.equal(two[name]) for name, tensor in one.items())
    assert all(tensor.equal(turned[name]) for name, tensor in one.items() if ".experts." not in name)
    swapped = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    assert one[swapped.format(0)].equal(turned[swapped.format(2)])


def test_the_router_of_a_file_is_taken(models: dict[str, list[Path]], tmp_path: Path) -> None:
    gates = {f"model.layers.{i}.block_sparse_moe.gate.weight": torch.randn(3, 32) for i in range(2)}
    save_file(gates, tmp_path / "router.safetensors")
    answer = [str(path) for path in models["llama"]]
    main(["merge", str(tmp_path / "moe"), *answer, "--method", "moe", "--router", str(tmp_path / "router.safetensors")])
    mixture = load_file(tmp_path / "moe/model.safetensors")
    assert all(mixture[name].equal(gate) for name, gate in gates.items())


def test_a_mixture_is_described_completely_and_not_converted_to_formats_that_cannot_hold_it(
    models: dict[str, list[Path]], tmp_path: Path
) -> None:
    merge(tmp_path / "moe", [(path, 1.0) for path in models["qwen3"]], method="moe")
    with open_model(tmp_path / "moe") as model:
        assert problems_of(model) == []
    facts = inspect(tmp_path / "moe")
    assert (facts.family, facts.problem, facts.converts_to) == ("qwen3_moe", None, ("huggingface",))
    convert(tmp_path / "moe", tmp_path / "copy", to="huggingface", dtype="bf16", verify=True)
    with pytest.raises(CheckpointError, match="converted to huggingface only"):
        convert(tmp_path / "moe", tmp_path / "megatron", to="megatron")


def test_a_mixture_is_neither_a_family_to_train_nor_a_seed(models: dict[str, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"mixtral is a mixture of experts. Mixtures are made of trained experts"):
        ModelConfig(family="mixtral")
    merge(tmp_path / "moe", [(path, 1.0) for path in models["llama"]], method="moe")
    with pytest.raises(CheckpointError, match=r"is a mixture of experts. Mixtures are not trained here"):
        ModelConfig(pretrained=tmp_path / "moe").shape(65, 32)


def test_inputs_that_make_no_mixture_are_refused_and_nothing_is_left(
    models: dict[str, list[Path]], tmp_path: Path
) -> None:
    llama = [(path, 1.0) for path in models["llama"]]
    qwen2 = save_random(tmp_path / "qwen2", 0, "qwen2")
    gpt2 = save_random(tmp_path / "gpt2", 0, "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=32)
    wide = save_random(tmp_path / "wide", 0, intermediate_size=44)
    save_file({"gate": torch.zeros(3, 32)}, tmp_path / "router.safetensors")
    cases: list[tuple[str, list[tuple[Path, float]], dict[str, Any]]] = [
        (
            "qwen2 layers have no mixture-of-experts class: its only mixture has a shared expert",
            [(qwen2, 1.0)] * 2,
            {},
        ),
        ("gpt2 layers have no mixture-of-experts class: transformers has none", [(gpt2, 1.0)] * 2, {}),
        ("intermediate_size 40 and 44", [llama[0], (wide, 1.0)], {}),
        ("top_k is 4 and there are 3 experts", llama, {"parameters": {"top_k": 4}}),
        ("top_k is 1.5", llama, {"parameters": {"top_k": 1.5}}),
        (
            "qwen3 layers have no mixture-of-experts class with a shared expert: Qwen3MoeForCausalLM has none",
            [(path, 1.0) for path in models["qwen3"]],
            {"ingredients": Ingredients(("a", "b", "c"), shared_expert=models["qwen3"][0])},
        ),
        (
            "window of 5 have no mixture-of-experts class with a shared expert",
            [(path, 1.0) for path in models["mistral"]],
            {"ingredients": Ingredients(("a", "b", "c"), shared_expert=models["mistral"][0])},
        ),
        (
            "intermediate_size 40 and 44",
            llama,
            {"ingredients": Ingredients(("a", "b", "c"), shared_expert=wide)},
        ),
        ("sum to 0", [(llama[0][0], 1.0), (llama[1][0], -1.0)], {}),
        (
            "'gate' is \\[3, 32\\] and must be absent",
            llama,
            {"ingredients": Ingredients(("a", "b", "c"), tmp_path / "router.safetensors")},
        ),
        ("3 experts need as many different names", llama, {"ingredients": Ingredients(("a", "b"))}),
        ("'linear' has no router", llama, {"method": "linear", "ingredients": Ingredients(("a", "b", "c"))}),
    ]
    before = sorted(tmp_path.iterdir())
    for message, inputs, settings in cases:
        with pytest.raises(CheckpointError, match=message):
            merge(tmp_path / "out", inputs, **{"method": "moe", **settings})
        assert sorted(tmp_path.iterdir()) == before


def moe_recipe(folder: Path, base: Path, models: list[Path], **changes: Any) -> Path:
    values = {"base_model": str(base), "gate_mode": "random", "experts_per_token": 1}
    sources = [{"source_model": str(path), "positive_prompts": ["a prompt"]} for path in models]
    path = folder / "moe.yaml"
    path.write_text(json.dumps(values | {"experts": sources} | changes))
    return path


@pytest.mark.parametrize("base_is_an_expert", [False, True])
def test_a_recipe_of_mergekit_moe_takes_all_but_the_mlps_from_its_base(
    models: dict[str, list[Path]], base_is_an_expert: bool, tmp_path: Path
) -> None:
    first, second, other = models["llama"]
    base = second if base_is_an_expert else other
    report = merge_by_recipe(tmp_path / "moe", moe_recipe(tmp_path, base, [first, second, first]))
    mixture = load_file(tmp_path / "moe/model.safetensors")
    rest = load_file(base / "model.safetensors")
    assert all(mixture[name].equal(tensor) for name, tensor in rest.items() if ".mlp." not in name)
    for number, path in enumerate((first, second, first)):
        ours = mixture[f"model.layers.0.block_sparse_moe.experts.{number}.w2.weight"]
        assert ours.equal(load_file(path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"])
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert (config["num_experts_per_tok"], config["expert_names"]) == (1, ["llama0", "llama1", "llama0-2"])
    again = merge_by_recipe(tmp_path / "again", tmp_path / "moe/merge_recipe.yaml")
    assert again.content_hash == report.content_hash
    assert merge_by_recipe(tmp_path / "again", tmp_path / "moe/merge_recipe.yaml").already_complete


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_mode": "hidden"}, r"gate_mode is 'hidden'.*--router FILE"),
        ({"shared_experts": []}, r"shared_experts is not supported. .* btm-scale upcycle RUN --shared-expert MODEL"),
        ({"experts": [{"source_model": "a", "residual_scale": 0.1}]}, r"experts\.0\.residual_scale is not supported"),
        ({"experts": []}, "experts "),
        ({"experts": 8}, "experts "),
        ({"experts_per_token": 4}, "top_k is 4 and there are 3 experts"),
        ({"experts_per_tok": 1}, "experts_per_tok is unknown. Did you mean 'experts_per_token'"),
        ({"architecture": "deepseek"}, "architecture is 'deepseek'"),
        ({"base_model": "nowhere"}, "nowhere"),
    ],
)
def test_a_recipe_of_mergekit_moe_that_makes_no_mixture_is_refused(
    models: dict[str, list[Path]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = moe_recipe(tmp_path, models["llama"][0], models["llama"], **changes)
    with pytest.raises(CheckpointError, match=message):
        merge_by_recipe(tmp_path / "moe", recipe)
    assert list(tmp_path.iterdir()) == [recipe]


def test_models_in_directories_of_one_name_are_numbered() -> None:
    assert names_of([Path("a/last"), Path("b/last"), Path("c")]) == ("last", "last-2", "c")
