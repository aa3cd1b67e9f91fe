"""Inputs of merge, convert and inspect that are missing, incomplete, or do not belong together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.small_models import TINY_SHAPE, Save, random_weights
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_config import config_json, read_shape
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import RunDir

OPENERS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda path, out: merge(out, [(path, 1.0)]),
    "inspect": lambda path, _: inspect(path),
    "convert to huggingface": lambda path, out: convert(path, out, to="huggingface"),
    "convert to megatron": lambda path, out: convert(path, out, to="megatron"),
}


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A llama model of zeros with its config.json."""
    shape = ModelShape.model_validate({"family": "llama", **TINY_SHAPE})
    folder = tmp_path / "described"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(shape, dtype="bfloat16", end_of_text=None)))
    layer = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
    }
    shapes = {f"layers.{i}.{name}": size for i in range(2) for name, size in layer.items()}
    shapes |= {"embed_tokens": (65, 32), "norm": (32,)}
    weights = {f"model.{name}.weight": torch.zeros(size, dtype=torch.bfloat16) for name, size in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("open_it", OPENERS.values(), ids=OPENERS)
def test_a_path_that_does_not_exist_is_reported_as_such(open_it: Callable[..., object], tmp_path: Path) -> None:
    for name in ("nope", "nope.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name} does not exist. Give the path of an existing model"):
            open_it(tmp_path / name, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_base_or_a_pretrained_model_that_does_not_exist_is_reported_as_such(save: Save, tmp_path: Path) -> None:
    model = save("model", random_weights(0))
    with pytest.raises(CheckpointError, match=r"nope does not exist\."):
        merge(tmp_path / "out", [(model, 1.0)], method="ties", base=tmp_path / "nope")
    with pytest.raises(CheckpointError, match=r"nope does not exist\. Train the model, or give the path"):
        read_shape(tmp_path / "nope")


@pytest.mark.parametrize("open_it", OPENERS.values(), ids=OPENERS)
def test_a_run_folder_points_to_its_experts(open_it: Callable[..., object], save: Save, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.experts.mkdir(parents=True)
    run.config.write_text("{}")
    with pytest.raises(CheckpointError, match=r"run is a run folder, not a model\. It has no experts yet: train"):
        open_it(run.root, tmp_path / "out")
    for name in ("code", "law"):
        save(f"run/experts/{name}", random_weights(0))
    for path, what in ((run.root, "a run folder"), (run.experts, "the folder of a run's experts")):
        with pytest.raises(CheckpointError) as raised:
            open_it(path, tmp_path / "out")
        experts = f"{run.experts / 'code'}, {run.experts / 'law'}."
        assert f"{path} is {what}, not a model. Give the folder of a model: {experts}" in str(raised.value)


def test_models_of_different_sizes_are_told_apart_by_their_configs_and_a_few_tensors(
    save: Save, tmp_path: Path
) -> None:
    many = {f"layer.{i}": torch.zeros(4) for i in range(82)}
    small = save("small", many, config={"hidden_size": 128, "num_hidden_layers": 4})
    large = {name: torch.zeros(8) for name in many}
    large |= {f"more.{i}": torch.zeros(4) for i in range(5)}
    with pytest.raises(CheckpointError) as raised:
        merge(tmp_path / "out", [(small, 1), (save("large", large, config={"hidden_size": 256}), 1)])
    head, config, lacking, shapes = str(raised.value).splitlines()
    assert head.endswith("Nothing was written:")
    assert "differ: hidden_size 128 and 256, num_hidden_layers 4 and (not set)." in config
    assert lacking.startswith(f"  - {small} has no tensor 'more.0', 'more.1', 'more.2' and 2 more tensors, but ")
    assert "different shapes: 'layer.0' [4] and [8], " in shapes
    assert shapes.endswith(" and 79 more tensors. Merge models of one architecture.")


def test_each_kind_of_difference_has_one_line(save: Save, tmp_path: Path) -> None:
    ours = {"a": torch.zeros(2), "b": torch.zeros(2), "mask": torch.ones(2), "position": torch.arange(2)}
    theirs = {name: tensor.bfloat16() for name, tensor in ours.items()}
    theirs |= {"mask": torch.ones(2, dtype=torch.bool), "position": torch.arange(2) + 1}
    with pytest.raises(CheckpointError) as raised:
        merge(tmp_path / "out", [(save("ours", ours), 1), (save("theirs", theirs), 1)])
    kinds, dtypes, values = str(raised.value).splitlines()[1:]
    assert "different kinds of numbers: 'mask'" in kinds
    assert dtypes.count("float32") == dtypes.count("bfloat16") == 2
    assert dtypes.endswith("Give the output's dtype (--dtype; `dtype` in Python).")
    assert "different values of integers: 'position'" in values


def test_inspect_names_a_missing_tensor_and_lists_no_conversions(described: Path) -> None:
    assert inspect(described).problem is None
    weights = load_file(described / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, described / "model.safetensors")
    broken = inspect(described)
    assert "lacks the tensor 'model.layers.1.mlp.up_proj.weight'. It must have" in str(broken.problem)
    assert broken.converts_to == broken.tensor_degrees == ()


def test_inspect_shows_the_degree_at_which_a_deepspeed_checkpoint_was_written(described: Path, tmp_path: Path) -> None:
    assert inspect(described).tensor_degree is None
    for tensor in (1, 2):
        convert(described, tmp_path / f"at-{tensor}", to="deepspeed", tensor=tensor)
        assert inspect(tmp_path / f"at-{tensor}").tensor_degree == tensor
