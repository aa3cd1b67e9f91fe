"""The models that a recipe names: adapters and their bases, repeated models, names of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_models import Save
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.merge.merge import merge, merge_by_recipe
from btm_scale.errors import CheckpointError

NAME = "layers.0.mlp.up_proj.weight"
Adapter = Callable[[str], torch.Tensor]


@pytest.fixture
def adapter(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Adapter:
    """Write the adapter `adapter` of a base in the working directory, `base`; return the tensor that both make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    draw = torch.Generator().manual_seed(0)
    for name in ("base", "other"):
        save(name, {f"model.{NAME}": torch.randn(6, 4, generator=draw)})

    def write(base: str) -> torch.Tensor:
        one, two = torch.randn(2, 4, generator=draw), torch.randn(6, 2, generator=draw)
        Path("adapter").mkdir()
        stem = f"base_model.model.model.{NAME.removesuffix('.weight')}"
        save_file({f"{stem}.lora_A.weight": one, f"{stem}.lora_B.weight": two}, "adapter/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]}
        Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        return tensor("base") + 2 * two @ one

    return write


def tensor(folder: str) -> torch.Tensor:
    return load_file(f"{folder}/model.safetensors")[f"model.{NAME}"]


def by_recipe(text: str) -> torch.Tensor:
    Path("recipe.yaml").write_text(text)
    merge_by_recipe(Path("out"), Path("recipe.yaml"))
    return tensor("out")


LINEAR = (
    "merge_method: linear\n"
    "models: [{model: adapter, parameters: {weight: WEIGHT}}, {model: other, parameters: {weight: 1}}]\n"
)


@pytest.mark.parametrize("weight", ["1", "[1, 1]"])
def test_an_adapter_in_a_recipe_is_the_model_that_it_makes_of_its_base(adapter: Adapter, weight: str) -> None:
    expected = (adapter("base") + tensor("other")) / 2
    torch.testing.assert_close(by_recipe(LINEAR.replace("WEIGHT", weight)), expected)


def test_the_base_of_an_adapter_is_looked_up_in_the_local_cache(adapter: Adapter) -> None:
    complete = adapter("org/base")
    snapshots = Path("home/hub/models--org--base/snapshots")
    snapshots.mkdir(parents=True)
    Path("base").rename(snapshots / "c0ffee")
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs/main").write_text("c0ffee")
    torch.testing.assert_close(by_recipe(LINEAR.replace("WEIGHT", "1")), (complete + tensor("other")) / 2)


def test_the_base_model_of_a_recipe_completes_an_adapter_whose_base_is_not_here(adapter: Adapter) -> None:
    complete = adapter("org/base")
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: adapter, parameters: {weight: 0.5}}]\n"
    torch.testing.assert_close(by_recipe(text), (complete + tensor("base")) / 2)


def test_an_adapter_without_a_base_is_refused_with_the_remedy_of_a_recipe(adapter: Adapter) -> None:
    adapter("org/base")
    with pytest.raises(CheckpointError, match=r"'org/base', which is neither .*`adapter_base` in a recipe"):
        by_recipe(LINEAR.replace("WEIGHT", "1"))
    assert not Path("out").exists()


def test_the_recipe_of_a_model_that_was_given_twice_gives_the_same_bytes(adapter: Adapter) -> None:
    merge(Path("one"), [(Path("base"), 1.0), (Path("other"), 0.5), (Path("base"), 2.0), (Path("base"), 0.1)])
    merge_by_recipe(Path("two"), Path("one/merge_recipe.yaml"))
    one, two = ({file.name: file.read_bytes() for file in Path(name).iterdir()} for name in ("one", "two"))
    assert one == two
