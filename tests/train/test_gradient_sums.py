"""ZeRO 1 sums gradients in the products that compute them, with the numbers of DeepSpeed's sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

LAYERS, MICRO_BATCHES, STEPS = 2, 3, 3
MATRICES = {"all": 4, "mlp": 2}


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sums")
    result = folder / "result.json"
    spec = {"parts": list(MATRICES), "result": str(result)}
    run_script(Path(__file__).with_name("sum_gradients.py"), spec, folder)
    return dict(json.loads(result.read_text()))


@pytest.mark.parametrize("part", MATRICES)
def test_sums_in_products_are_deepspeeds_to_the_bit(part: str, sums: dict[str, Any]) -> None:
    assert sums[part]["ours"] == sums[part]["theirs"]
    assert sums[part]["products"] == LAYERS * MATRICES[part] * MICRO_BATCHES * STEPS


@pytest.mark.parametrize("part", MATRICES)
def test_gradients_are_left_to_deepspeed_where_its_hooks_add_them(part: str, sums: dict[str, Any]) -> None:
    assert sums[part]["immediate"] == sums[part]["theirs"]
    assert sums[part]["immediate products"] == 0
