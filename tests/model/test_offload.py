"""Inputs of recomputed layers on the host: the same bits, and two of them on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.small_models import TINY_SHAPE
from helpers.worlds import run_script

from btm_scale.config.layout import Layout
from btm_scale.launch.memory import activation_bytes
from btm_scale.model.shape import ModelShape

LAYERS = 5
SHAPE = {**TINY_SHAPE, "family": "llama", "layers": LAYERS, "positions": 64}
CASES: dict[str, dict[str, Any]] = {
    "full": {"shape": SHAPE, "recompute": "full"},
    "tiled": {"shape": SHAPE, "recompute": "tiled"},
    "gpt2": {"shape": {**SHAPE, "family": "gpt2", "kv_heads": 4}, "recompute": "full"},
    "only MLPs trained": {"shape": SHAPE, "recompute": "full", "trains": "mlp"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("offload")
    run_script(Path(__file__).with_name("hold_inputs.py"), {"cases": CASES, "result": str(folder / "result")}, folder)
    return dict(json.loads((folder / "result").read_text()))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("copies", ["at once", "late"])
def test_losses_and_gradients_are_those_without_offloading_to_the_bit(
    copies: str, name: str, results: dict[str, Any]
) -> None:
    assert len(results[name][copies]) > 10
    assert all(results[name][copies])


@pytest.mark.parametrize("name", CASES)
def test_buffers_are_used_again_by_every_micro_batch(name: str, results: dict[str, Any]) -> None:
    # Of each layer but the last, and as many while the graph of a forward pass alone is released.
    assert LAYERS - 1 <= results[name]["buffers"] <= 2 * (LAYERS - 1)


@pytest.mark.parametrize("recompute", ["full", "tiled"])
def test_two_inputs_of_layers_stay_on_the_device(recompute: str, results: dict[str, Any]) -> None:
    before, after = results[recompute]["peaks"]
    length = 512
    left = (LAYERS - 2) * 2 * 2 * length * SHAPE["hidden"]  # of two sequences, in bf16
    # The peak is then later in the backward pass, when more gradients of weights exist.
    assert 0.5 * left < before - after <= left
    layout = Layout(recompute=recompute, precision="bf16")
    planned = [
        activation_bytes(ModelShape.model_validate(SHAPE), one, micro_batch=2, length=length)
        for one in (layout, layout.model_copy(update={"offload_activations": True}))
    ]
    assert planned[0] - planned[1] == left
