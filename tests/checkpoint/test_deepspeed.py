"""Checkpoints that the real DeepSpeed engine saved, read without it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from btm_scale.checkpoint.deepspeed import open_deepspeed, training_step
from btm_scale.checkpoint.formats import open_model
from btm_scale.checkpoint.merge import merge
from btm_scale.checkpoint.safetensors import SafetensorsModel
from btm_scale.errors import CheckpointError
from btm_scale.model.huggingface import config_json
from btm_scale.model.names import join, table, to_huggingface
from btm_scale.model.shape import ModelShape

SAVER = Path(__file__).with_name("save_with_engine.py")
TIED = {"layers": 2, "hidden": 32, "heads": 4, "groups": 2, "ffn": 40, "positions": 16, "vocabulary": 65}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped-tied-odd": TIED,
    "grouped-untied-even": TIED | {"tied": False, "vocabulary": 64},
    "plain-untied-odd": TIED | {"tied": False, "groups": 4},
    "plain-tied-even": TIED | {"groups": 4, "vocabulary": 64},
    "gpt2": TIED | {"family": "gpt2", "groups": 4},
}
# Every stage sees every shape property, tied or not, grouped or not, divisible or not.
VARIANTS = [(name, stage) for stage in (1, 2, 3) for name in SHAPES if name != "gpt2"]
VARIANTS += [("grouped-tied-odd", 0), ("gpt2", 1)]


@dataclass(frozen=True)
class Saved:
    """What one layout's engine left."""

    root: Path
    tensor: int

    def folder(self, name: str, stage: int) -> Path:
        return self.root / f"{name}-{stage}"


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tensor{layout[0]}-data{layout[1]}")
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    tensor, data = request.param
    root = tmp_path_factory.mktemp("engine")
    variants = []
    for name, stage in VARIANTS:
        folder = root / f"{name}-{stage}"
        folder.mkdir()
        config = config_json(ModelShape(**SHAPES[name]), dtype="float32", end_of_text=None)
        (folder / "config.json").write_text(json.dumps(config))
        variants.append({"folder": str(folder), "shape": SHAPES[name], "stage": stage})
    spec = root / "spec.json"
    spec.write_text(json.dumps({"tensor": tensor, "data": data, "variants": variants}))
    run_ranks(SAVER, spec, tensor * data)
    return Saved(root, tensor)


def engine_weights(saved: Saved, folder: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    """The engine's own full weights under Hugging Face names."""
    parts = [load_file(folder / f"engine-{rank}.safetensors") for rank in range(saved.tensor)]
    whole: dict[str, torch.Tensor] = {}
    for entry in table(shape):
        whole |= to_huggingface(entry, join(entry, [part[entry.megatron] for part in parts]), shape)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), VARIANTS)
def test_what_is_read_is_what_the_engine_holds(saved: Saved, name: str, stage: int) -> None:
    folder, shape = saved.folder(name, stage), ModelShape(**SHAPES[name])
    expected = engine_weights(saved, folder, shape)
    with open_deepspeed(folder) as model:
        assert set(model.names) == set(expected)
        for tensor in model.names:
            assert model.read(tensor).dtype == (torch.float32 if stage else torch.bfloat16)
            assert model.read(tensor).equal(expected[tensor]), tensor
            middle = expected[tensor].numel() // 2
            assert model.read_range(tensor, 5, middle).equal(expected[tensor].reshape(-1)[5:middle])
    assert training_step(folder) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stage"), [("grouped-tied-odd", 3), ("plain-untied-odd", 2), ("gpt2", 1)])
def test_a_merge_of_it_computes_in_transformers_what_the_engine_computes(
    saved: Saved, name: str, stage: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved.folder(name, stage)
    merge(tmp_path / "out", [(folder, 1.0)], dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    seen = load_file(folder / "hidden.safetensors")
    with torch.no_grad():
        hidden = model.base_model(seen["tokens"]).last_hidden_state.float()
    # The two differ in the order of a few roundings to 8 bits; a wrong tensor gives errors near 1.
    assert float((hidden - seen["hidden"]).abs().max()) < 0.06
    assert float(hidden.abs().max()) > 1


@pytest.mark.slow
def test_it_agrees_with_deepspeeds_own_converter_where_that_can_read_it(saved: Saved) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if saved.tensor > 1:
        pytest.skip("zero_to_fp32 knows no tensor parallel checkpoints")
    for stage in (2, 3):
        folder = saved.folder("plain-untied-odd", stage)
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        shape = ModelShape(**SHAPES["plain-untied-odd"])
        with open_deepspeed(folder) as ours:
            for entry in table(shape):
                for name, tensor in to_huggingface(entry, theirs[entry.megatron], shape).items():
                    assert ours.read(name).equal(tensor)


@pytest.mark.slow
def test_sixteen_bit_weights_are_read_where_they_are_and_told_where_not(saved: Saved) -> None:
    masters = open_deepspeed(saved.folder("grouped-tied-odd", 2))
    halves = open_deepspeed(saved.folder("grouped-tied-odd", 2), master=False)
    for name in masters.names:
        assert halves.read(name).equal(masters.read(name).bfloat16())
    with pytest.raises(CheckpointError, match="ZeRO 3, which leaves out"):
        open_deepspeed(saved.folder("grouped-tied-odd", 3), master=False)


@pytest.mark.slow
def test_inputs_of_different_formats_merge(saved: Saved, tmp_path: Path) -> None:
    first, second = saved.folder("grouped-tied-odd", 1), saved.folder("grouped-tied-odd", 3)
    merge(tmp_path / "converted", [(second, 1.0)])
    mixed = merge(tmp_path / "mixed", [(first, 1.0), (tmp_path / "converted", 2.0)])
    same = merge(tmp_path / "same", [(first, 1.0), (second, 2.0)])
    assert mixed.content_hash == same.content_hash


@pytest.mark.slow
def test_missing_files_and_configs_are_told(saved: Saved, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(saved.folder("plain-tied-even", 2), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"Put the config\.json"):
        open_model(folder)
    optimizer = next(folder.glob("*/*_optim_states.pt"))
    optimizer.write_bytes(optimizer.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="Copy it again"):
        open_model(folder)


def universal(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        (folder / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, folder / "zero" / name / "fp32.pt")


def test_a_universal_checkpoint_is_read(tmp_path: Path) -> None:
    weights = {"layer.weight": torch.randn(3, 5), "norm.weight": torch.randn(5)}
    universal(tmp_path, weights)
    model = open_model(tmp_path)
    assert model.names == ("layer.weight", "norm.weight")
    assert all(model.read(name).equal(tensor) for name, tensor in weights.items())
    merge(tmp_path / "out", [(tmp_path, 1.0)])
    assert SafetensorsModel(tmp_path / "out").read("layer.weight").equal(weights["layer.weight"])
