"""Experts of which a part is trained: the rest keeps the bits of the parent in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import TINY_SHAPE
from helpers.worlds import run_script
from pydantic import ValidationError
from safetensors.torch import load_file

from btm_scale.config.run import RunConfig
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import frozen_names
from btm_scale.train.jobs import training_job

SHAPE = {"family": "llama", **TINY_SHAPE}
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero-0": {"data": 2, "zero": 0, "precision": "bf16", "micro_batch": 2},
    "zero-0-fp32": {"data": 2, "zero": 0, "precision": "fp32"},
    "zero-1": {"data": 2, "zero": 1, "precision": "bf16", "recompute": "full"},
    "zero-2": {"data": 2, "zero": 2, "precision": "bf16", "micro_batch": 2},
    "zero-3": {"data": 2, "zero": 3, "precision": "bf16", "recompute": "full"},
    "tensor": {"tensor": 2, "zero": 1, "precision": "fp32", "sequence_parallel": True},
    "local-steps": {"data": 2, "zero": 1, "precision": "fp32", "sync_every": 2},
}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensors]]:
    """By layout: the weights of a parent, of its expert, and of the same expert trained with an interruption."""
    folder = tmp_path_factory.mktemp("mlps")
    spec = {"layouts": LAYOUTS, "shape": SHAPE, "steps": 4, "sequences": 8, "folder": str(folder)}
    run_script(Path(__file__).with_name("train_mlps.py"), spec, folder)
    result: dict[str, dict[str, Tensors]] = {}
    for name in LAYOUTS:
        models: dict[str, Tensors] = {}
        for key, tensor in load_file(folder / f"{name}.safetensors").items():
            kind, _, tensor_name = key.partition("/")
            models.setdefault(kind, {})[tensor_name] = tensor
        result[name] = models
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_that_trains_its_mlps_keeps_the_bits_of_all_else(
    layout: str, trained: dict[str, dict[str, Tensors]]
) -> None:
    parent, expert = trained[layout]["parent"], trained[layout]["expert"]
    kept = {name for name, tensor in expert.items() if torch.equal(tensor, parent[name])}
    assert kept == frozen_names(ModelShape.model_validate(SHAPE), "mlp")
    assert {name for name in expert if ".mlp." in name} == expert.keys() - kept


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_expert_that_trains_its_mlps_ends_in_the_same_bits(
    layout: str, trained: dict[str, dict[str, Tensors]]
) -> None:
    expert, resumed = trained[layout]["expert"], trained[layout]["resumed"]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expert.items())


def test_every_layout_trains_the_same_mlps(trained: dict[str, dict[str, Tensors]]) -> None:
    one, other = trained["zero-0-fp32"]["expert"], trained["tensor"]["expert"]
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=0, msg=name)


def config(**expert: Any) -> RunConfig:
    domains = {"code": {"text": "code.jsonl"}, "law": {"text": "law.jsonl"}}
    return RunConfig.model_validate({"domains": domains, "experts": {"law": expert}})


def test_an_expert_trains_everything_unless_its_config_names_a_part() -> None:
    trains_mlps = config(train="mlp")
    parts = {model: training_job(trains_mlps, model).trains for model in ("seed", "dense", "code", "law")}
    assert parts == {"seed": "all", "dense": "all", "code": "all", "law": "mlp"}


def test_an_expert_with_its_own_sizes_has_no_parent_whose_bits_it_could_keep() -> None:
    with pytest.raises(ValidationError, match=r"experts\.law: has both model and train: mlp"):
        config(train="mlp", model={"preset": "llama-1m"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_flops_and_parameters_of_a_part_are_those_of_its_tensors(family: str) -> None:
    from btm_scale.model.hf_weights import huggingface_shapes

    shape = ModelShape.model_validate({"family": family, **TINY_SHAPE, "kv_heads": 4})
    frozen = frozen_names(shape, "mlp")
    sizes = {name: torch.Size(size).numel() for name, size in huggingface_shapes(shape).items()}
    assert shape.trained_parameters("mlp") == sum(size for name, size in sizes.items() if name not in frozen)
    assert shape.trained_parameters("all") == sum(sizes.values())
    saved = shape.flops_per_token(16) - shape.flops_per_token(16, "mlp")
    unused = 0 if shape.rotary else sizes["transformer.wpe.weight"]
    assert saved == 2 * (sum(sizes[name] for name in frozen) - unused)
