"""Merges by recipe: mergekit's YAML, against formulas in plain torch, and the recipe that every merge writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save, Weights
from safetensors.torch import save_file

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.merge.merge import merge, merge_by_recipe
from btm_scale.checkpoint.merge.recipe_methods import RECIPE_METHODS
from btm_scale.checkpoint.merge.recipe_parameters import value_of
from btm_scale.checkpoint.merge.registry import METHODS
from btm_scale.cli.app import parse
from btm_scale.cli.verb import Call
from btm_scale.errors import CheckpointError, UserError

LAYERS = 3
Write = Callable[[str], Path]


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,), "lm_head.weight": (9, 4)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": (4, 4) for name in ("self_attn.q_proj", "mlp.up_proj")}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def models(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Weights]:
    """A base and two models in the working directory, by their names there."""
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "layer_types": ["full", "sliding", "full"]}
    made = {name: weights_of(seed) for seed, name in enumerate(("base", "a", "b"))}
    for name, weights in made.items():
        save(name, weights, config=config)
    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe."""

    def to_file(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return file

    return to_file


def merged(recipe: Path) -> Weights:
    merge_by_recipe(Path("out"), recipe)
    with SafetensorsModel(Path("out")) as out:
        return {name: out.read(name) for name in out.names}


def test_weights_follow_gradients_and_filters_of_a_recipe(models: dict[str, Weights], write: Write) -> None:
    recipe = write("""
merge_method: linear
models:
  - {model: a, parameters: {weight: [1, 0]}}
  - model: b
    parameters:
      weight: [{filter: mlp, value: [1.0, 2.0, 5.0]}, {value: 0.5}]
""")
    for name, tensor in merged(recipe).items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        first = 1 - layer / (LAYERS - 1)
        second = [1.0, 2.0, 5.0][layer] if "mlp" in name else 0.5
        expected = (first * models["a"][name].double() + second * models["b"][name].double()) / (first + second)
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7)


def test_parameters_of_a_method_may_differ_between_models(models: dict[str, Weights], write: Write) -> None:
    recipe = write("""
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0, density: 1.0}}
  - {model: b, parameters: {weight: 0.5, density: 0.5}}
parameters: {normalize: false, lambda: 2}
""")
    for name, tensor in merged(recipe).items():
        base = models["base"][name]
        first, second = (models[model][name] - base for model in ("a", "b"))
        least = second.abs().flatten().sort(descending=True).values[second.numel() // 2 - 1]
        first, second = first, 0.5 * second * (second.abs() >= least)
        sign = torch.where(first + second >= 0, 1, -1)
        expected = base + 2 * sum(delta * (delta.sign() == sign) for delta in (first, second))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


def test_slices_stack_layers_of_several_models(models: dict[str, Weights], write: Write) -> None:
    recipe = write("""
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: b
        layer_range: [1, 3]
        parameters: {scale: [{filter: q_proj, value: 0.5}, {value: 1.0}]}
""")
    out = merged(recipe)
    assert sum(name.endswith("q_proj.weight") for name in out) == 4
    assert out["model.embed_tokens.weight"].equal(models["a"]["model.embed_tokens.weight"])
    assert out["lm_head.weight"].equal(models["b"]["lm_head.weight"])
    assert out["model.layers.1.mlp.up_proj.weight"].equal(models["a"]["model.layers.1.mlp.up_proj.weight"])
    assert out["model.layers.2.mlp.up_proj.weight"].equal(models["b"]["model.layers.1.mlp.up_proj.weight"])
    assert out["model.layers.3.self_attn.q_proj.weight"].equal(
        models["b"]["model.layers.2.self_attn.q_proj.weight"] / 2
    )
    config = json.loads(Path("out/config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["full", "sliding", "sliding", "full"]


def test_slices_of_models_in_different_dtypes_need_the_dtype_of_the_output(
    models: dict[str, Weights], write: Write
) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in models["b"].items()}, "b/model.safetensors")
    slices = ", ".join(f"{{sources: [{{model: {name}, layer_range: [0, 1]}}]}}" for name in "ab")
    text = f"merge_method: passthrough\nslices: [{slices}]\n"
    with pytest.raises(CheckpointError, match=r"bfloat16 .* and float32 .* in a layer before"):
        merge_by_recipe(Path("out"), write(text))
    assert {tensor.dtype for tensor in merged(write(text + "dtype: float16\n")).values()} == {torch.float16}


def test_a_slice_merges_different_layers_of_its_models(models: dict[str, Weights], write: Write) -> None:
    recipe = write("""
merge_method: slerp
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}]
parameters: {t: [0.0, 1.0]}
""")
    out = merged(recipe)
    for part in ("self_attn.q_proj", "mlp.up_proj"):
        assert out[f"model.layers.0.{part}.weight"].equal(models["base"][f"model.layers.0.{part}.weight"])
        assert out[f"model.layers.1.{part}.weight"].equal(models["a"][f"model.layers.2.{part}.weight"])


def test_the_order_of_models_and_the_number_of_processes_change_no_byte(
    models: dict[str, Weights], write: Write
) -> None:
    parts = ["{model: a, parameters: {weight: [1, 0.3], density: 0.6}}", "{model: b, parameters: {weight: 0.2}}"]
    hashes = set()
    for i, order in enumerate((parts, parts[::-1])):
        recipe = write(f"merge_method: dare_ties\nbase_model: base\nmodels: [{', '.join(order)}]\n")
        hashes.add(
            merge_by_recipe(Path(f"out{i}"), recipe, jobs=1 + i, chunk_bytes=10**6 - 10**6 * i + 64).content_hash
        )
    assert len(hashes) == 1


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"moe"}))
def test_the_recipe_that_a_merge_writes_gives_the_same_bytes(method: str, models: dict[str, Weights]) -> None:
    weights = (0.3, 0.7) if METHODS[method].weighted else (1.0, 1.0)
    inputs = [(Path(name), weight) for name, weight in zip("ab", weights, strict=True)][: METHODS[method].exactly or 2]
    merge(
        Path("one"),
        inputs,
        method=method,
        base=Path("base") if METHODS[method].needs_base else None,
        dtype="bfloat16",
        random_seed=7,
        max_shard_bytes=300,
    )
    merge_by_recipe(Path("two"), Path("one/merge_recipe.yaml"))
    assert contents(Path("one")) == contents(Path("two"))
    assert str(Path.cwd()) not in Path("one/merge_recipe.yaml").read_text()


def test_the_written_recipe_of_slices_and_gradients_gives_the_same_bytes(
    models: dict[str, Weights], write: Write
) -> None:
    recipe = write("""
merge_method: della
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [1, 3], parameters: {weight: [0.5, 1], density: 0.6, epsilon: 0.1}}
base_model: base
dtype: bfloat16
""")
    merge_by_recipe(Path("one"), recipe, random_seed=3)
    merge_by_recipe(Path("two"), Path("one/merge_recipe.yaml"))
    assert contents(Path("one")) == contents(Path("two"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_method_has_a_name_in_recipes() -> None:
    assert {method.function for method in RECIPE_METHODS.values()} == set(METHODS) - {"moe"}


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.9, 0.3),
        (True, 0.0, 1.0),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.75, 0.5),
        ([2], 0.4, 2.0),
        ([False, True], 0.9, 0.0),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 9}], 0.5, 2.0),
        ([{"filter": "norm", "value": 1}, {"filter": "*", "value": 5}], 0.5, 5.0),
        ({"filter": "norm", "value": 1}, 0.5, None),
    ],
)
def test_a_setting_has_this_value_for_a_tensor_of_a_layer(setting: object, t: float, expected: float | None) -> None:
    assert value_of(setting, "model.layers.3.mlp.up_proj.weight", t) == expected


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LINEAR.replace("model: a", f"model: {'x' * 300}"), "x is not a path: File name too long"),
        (LINEAR.replace("linear", "karcher").replace("weight: 1", "") + "parameters: {max_iter: 1e9}", "be 0 to 1,000"),
        (LINEAR + "modules: {text: 1}\n", r"modules is \{'text': 1\}, and is not supported\. Merge the language model"),
        (LINEAR.replace("model: a", "model: a+lora"), "models.0.model is 'a.lora', a model with an adapter"),
        (LINEAR + "dtyp: float32\n", r"dtyp is unknown\. Did you mean 'dtype'\?"),
        (LINEAR.replace("model: b", "modle: b"), "models.1.model is missing"),
        (LINEAR.replace("linear", "linaer"), "merge_method: Unknown merge method 'linaer'. Did you mean 'linear'"),
        (LINEAR + "parameters: {t: 1}\n", "parameters.t is not a parameter of 'linear'.* normalize, weight"),
        (LINEAR.replace("weight: 1}", "weight: '1'}"), "models.0.parameters.weight is '1'. It must be a number"),
        (LINEAR.replace("weight: 1}", "normalize: true}"), "normalize applies to all models. Move it to `parameters`"),
        (LINEAR.replace("weight: 1}", "weight: [{vlaue: 1}]}"), r"weight.0.vlaue is unknown. Did you mean 'value'\?"),
        (LINEAR.replace("parameters: {weight: 1}", "parameters: {}", 1), "parameter weight is missing for the models"),
        (LINEAR.replace("linear", "slerp").replace("weight: 1", ""), "The parameter t is missing"),
        (LINEAR + "slices: []\n", "slices "),
        (LINEAR.replace("linear", "ties"), "base_model is missing. 'ties' needs"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 9]}]}]\n",
            r"slices.0.sources.0.layer_range is \[1, 9\], but a has 3 layers and none with the number 3",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 99999999999]}]}]\n",
            "a has 3 layers and none with the number 3",
        ),
        (LINEAR + "parameters:\ndtype: 1\n", "dtype must be a valid string, and is 1"),
        ("merge_method: linear\n", "neither of `models` and `slices`"),
        (LINEAR.replace("model: b", "model: org/b"), "org/b does not exist, and is not in the Hugging Face cache"),
        ("- 1\n", "is not a mapping of keys to values"),
        (LINEAR + "parameters: &a [*a]\n", r"recipe.yaml, line 3: recursive alias '\*a'"),
        (
            LINEAR.replace("linear", "dare_ties").replace("weight: 1}", "weight: 1, density: [0, 1]}")
            + "base_model: base\n",
            "weight: 'dare_ties' would keep a fraction of 0 of the elements",
        ),
    ],
)
def test_what_a_recipe_cannot_have_is_refused_by_name(
    recipe: str, message: str, models: dict[str, Weights], write: Write
) -> None:
    with pytest.raises(CheckpointError, match=message):
        merge_by_recipe(Path("out"), write(recipe))
    assert not Path("out").exists()


def test_names_of_the_hub_are_located_in_the_local_cache(
    models: dict[str, Weights], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    repository = tmp_path / "home/hub/models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("c0ffee")
    (repository / "snapshots").mkdir()
    Path("a").rename(repository / "snapshots/c0ffee")
    out = merged(write(LINEAR.replace("model: a", "model: org/model").replace("model: b", "model: org/model@c0ffee")))
    assert all(tensor.equal(models["a"][name]) for name, tensor in out.items())
    assert "model: org/model\n" in Path("out/merge_recipe.yaml").read_text()


def test_the_command_merges_by_a_recipe(models: dict[str, Weights], write: Write) -> None:
    recipe = write(LINEAR)
    for _ in range(2):  # the second time nothing is written
        call = parse(["merge", "out", "--recipe", str(recipe), "--json"])
        assert isinstance(call, Call)
        assert call.run() == 0
    assert Path("out/merge_recipe.yaml").is_file()
    for words, message in (
        (["a", "--recipe", str(recipe)], "--recipe and DIR were given"),
        ([], "No models were given"),
    ):
        call = parse(["merge", "other", *words])
        assert isinstance(call, Call)
        with pytest.raises(UserError, match=message):
            call.run()
