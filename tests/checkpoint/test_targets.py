"""`inspect` lists exactly the formats that `convert` accepts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, write_model
from safetensors.torch import load_file, save_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.targets import TARGETS
from btm_scale.errors import CheckpointError

ALL = set(TARGETS)
WITHOUT_MOMENTS = ALL - {"universal"}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
MIXTRAL["architectures"] = ["MixtralForCausalLM"]


def training_checkpoint(folder: Path, *, moments_of: str = "", more: str = "") -> Path:
    """Write a training checkpoint with the moments of parameters whose name contains `moments_of`."""
    weights = complete_weights(0, dtype=torch.float32)
    tensors = {f"master/{name}": tensor for name, tensor in weights.items()}
    for kind in ("exp_avg", "exp_avg_sq"):
        tensors |= {f"{kind}/{name}": tensor.clone() for name, tensor in weights.items() if moments_of in name}
    if more:
        tensors |= {f"{more}/{name}": tensor.clone() for name, tensor in weights.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": 7, "adam_steps": 7}))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return folder


def model(folder: Path, config: dict[str, Any] = LLAMA, **more: torch.Tensor) -> Path:
    extra = {name.replace("__", "."): tensor for name, tensor in more.items()}
    return write_model(folder, complete_weights(0, config) | extra, config)


def base_class(folder: Path) -> Path:
    weights = complete_weights(0)
    return write_model(folder, {name.removeprefix("model."): tensor for name, tensor in weights.items()})


def incomplete(folder: Path) -> Path:
    weights = complete_weights(0)
    del weights["model.layers.1.mlp.up_proj.weight"]
    return write_model(folder, weights)


CASES: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "a training checkpoint": (training_checkpoint, ALL),
    "a training checkpoint of the MLPs": (
        lambda folder: training_checkpoint(folder, moments_of="mlp"),
        WITHOUT_MOMENTS,
    ),
    "a training checkpoint of local steps": (lambda folder: training_checkpoint(folder, more="outer"), WITHOUT_MOMENTS),
    "a model": (model, WITHOUT_MOMENTS),
    "a model of the base class": (base_class, WITHOUT_MOMENTS),
    "a model with an own head beside a tied embedding": (
        lambda folder: write_model(folder, complete_weights(0), LLAMA | {"tie_word_embeddings": True}),
        {"huggingface"},
    ),
    "a model with one tensor more": (lambda folder: model(folder, v_head__weight=torch.ones(1, 32)), {"huggingface"}),
    "a mixture of experts": (lambda folder: model(folder, MIXTRAL), {"huggingface"}),
    "a family that is not supported": (
        lambda folder: write_model(folder, {"a.weight": torch.ones(2)}, {"model_type": "other"}),
        {"huggingface"},
    ),
    "an incomplete model": (incomplete, set()),
}


@pytest.mark.parametrize(("write", "targets"), CASES.values(), ids=CASES)
def test_inspect_lists_what_convert_accepts(write: Callable[[Path], Path], targets: set[str], tmp_path: Path) -> None:
    path = write(tmp_path / "given")
    described = inspect(path)
    assert set(described.converts_to) == targets
    assert bool(described.tensor_degrees) == ("megatron" in targets)
    for target in TARGETS:
        out = tmp_path / target
        if target in targets:
            convert(path, out, to=target)
        else:
            with pytest.raises(CheckpointError):
                convert(path, out, to=target)
        assert out.exists() == (target in targets)


def test_names_of_the_base_class_become_those_of_the_causal_lm(tmp_path: Path) -> None:
    convert(base_class(tmp_path / "base"), tmp_path / "megatron", to="megatron", verify=True)
    convert(tmp_path / "megatron", tmp_path / "back", to="huggingface")
    written = load_file(tmp_path / "back/model.safetensors")
    assert written.keys() == complete_weights(0).keys()
    assert all(tensor.equal(written[name]) for name, tensor in complete_weights(0).items())
