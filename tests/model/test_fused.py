"""The layers for a GPU compute what those for a CPU do, and these what Megatron-core's do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.worlds import run_script
from torch.nn import functional

from btm_scale.model.cpu_layer import SwiGlu
from btm_scale.model.families import FAMILIES

CASES: dict[str, dict[str, Any]] = {
    **{family: {"family": family} for family in FAMILIES},
    "llama, all recomputed": {"family": "llama", "recompute": "full"},
    "llama, attention recomputed": {"family": "llama", "recompute": "selective"},
    "llama, separate documents": {"family": "llama", "documents": True},
    "llama, two tensor ranks": {"family": "llama", "tensor": 2},
    "gpt2, all recomputed": {"family": "gpt2", "recompute": "full"},
    "gpt2, MLP in tiles": {"family": "gpt2", "recompute": "tiled"},
    "gpt2, attention recomputed": {"family": "gpt2", "recompute": "selective"},
    "gpt2, separate documents": {"family": "gpt2", "documents": True},
    "gpt2, weights released": {"family": "gpt2", "releases": True},
    "gpt2, two tensor ranks": {"family": "gpt2", "tensor": 2},
}
DEFAULTS = {"recompute": "none", "documents": False, "tensor": 1, "releases": False}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("fused")
    spec = {"cases": {name: DEFAULTS | case for name, case in CASES.items()}, "result": str(folder / "result")}
    run_script(Path(__file__).with_name("train_fused.py"), spec, folder)
    return {name: row for path in folder.glob("result.*") for name, row in json.loads(path.read_text()).items()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_layers_for_a_cpu(
    name: str, differences: dict[str, dict[str, Any]]
) -> None:
    assert differences[name]["loss"] <= 1e-5
    assert differences[name]["gradient"] <= 1e-4


@pytest.mark.parametrize("name", CASES)
def test_the_mlps_for_a_cpu_have_the_bits_of_megatron_cores(name: str, differences: dict[str, dict[str, Any]]) -> None:
    assert differences[name]["same_mlp"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 10), (256, 2, 1376), (2, 0, 8)])
def test_swiglu_has_the_bits_of_the_operators_that_it_replaces(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(0)
    values = (3 * torch.randn(shape, generator=numbers)).to(dtype).requires_grad_()
    upstream = torch.randn(*shape[:-1], shape[-1] // 2, generator=numbers).to(dtype)
    gate, up = values.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    result = SwiGlu.apply(values)
    assert torch.equal(result, expected)
    assert torch.equal(*(torch.autograd.grad(one, values, upstream)[0] for one in (result, expected)))


def test_weights_that_will_be_loaded_are_not_drawn(differences: dict[str, dict[str, Any]]) -> None:
    assert {row["drawn"] for row in differences.values()} == {0.0}
