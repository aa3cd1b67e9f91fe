"""ZeRO 1 sums gradients in the products that compute them, with the numbers of DeepSpeed's sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

LAYERS, MICRO_BATCHES, STEPS = 2, 3, 3
# With the matrices of each layer whose gradients are sums.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({"family": "llama", "part": "all", "fused": False}, 4),
    "llama, MLPs alone": ({"family": "llama", "part": "mlp", "fused": False}, 2),
    "llama on a GPU": ({"family": "llama", "part": "all", "fused": True}, 4),
    "gpt2 on a GPU": ({"family": "gpt2", "part": "all", "fused": True}, 4),
    "gpt2 on a GPU, MLPs alone": ({"family": "gpt2", "part": "mlp", "fused": True}, 2),
}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sums")
    result = folder / "result.json"
    spec = {"cases": {name: case for name, (case, _) in CASES.items()}, "result": str(result)}
    run_script(Path(__file__).with_name("sum_gradients.py"), spec, folder)
    return dict(json.loads(result.read_text()))


@pytest.mark.parametrize("name", CASES)
def test_sums_in_products_are_deepspeeds_to_the_bit(name: str, sums: dict[str, Any]) -> None:
    assert sums[name]["ours"] == sums[name]["theirs"]
    assert sums[name]["products"] == LAYERS * CASES[name][1] * MICRO_BATCHES * STEPS


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_left_to_deepspeed_where_its_hooks_add_them(name: str, sums: dict[str, Any]) -> None:
    assert sums[name]["immediate"] == sums[name]["theirs"]
    assert sums[name]["immediate products"] == 0
