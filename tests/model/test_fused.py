"""The layers for a GPU compute what those for a CPU do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

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
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("fused")
    spec = {"cases": {name: DEFAULTS | case for name, case in CASES.items()}, "result": str(folder / "result")}
    run_script(Path(__file__).with_name("train_fused.py"), spec, folder)
    return {name: row for path in folder.glob("result.*") for name, row in json.loads(path.read_text()).items()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_layers_for_a_cpu(
    name: str, differences: dict[str, dict[str, float]]
) -> None:
    assert differences[name]["loss"] <= 1e-5
    assert differences[name]["gradient"] <= 1e-4


def test_weights_that_will_be_loaded_are_not_drawn(differences: dict[str, dict[str, float]]) -> None:
    assert {row["drawn"] for row in differences.values()} == {0.0}
