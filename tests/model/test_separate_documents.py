"""Packed documents that do not attend to each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

SIZES = {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "positions": 24, "vocabulary": 65}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 2},
    "gpt2": {"kv_heads": 4},
    "mistral": {"kv_heads": 2, "window": 5},
    "qwen3": {"kv_heads": 2, "head_size": 10},
}
CASES = {
    f"{family}, {recompute} recomputation, tensor {tensor}": {
        "shape": {"family": family, **SIZES, **extra},
        "recompute": recompute,
        "tensor": tensor,
        "restart": family == "gpt2",
    }
    for family, extra in FAMILIES.items()
    for recompute, tensor in (("none", 1), ("selective", 1), ("full", 2))
}
CASES["llama, positions that restart"] = CASES["llama, none recomputation, tensor 1"] | {"restart": True}


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("documents")
    result = folder / "result.json"
    run_script(Path(__file__).with_name("separate_documents.py"), {"cases": CASES, "result": str(result)}, folder)
    return {
        name: one for tensor in (1, 2) for name, one in json.loads(result.with_suffix(f".{tensor}").read_text()).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(
    name: str, differences: dict[str, dict[str, float]]
) -> None:
    """Of learned positions, too, which then begin at 0 in each document."""
    assert differences[name]["loss"] < 1e-6
    assert differences[name]["gradient"] < 1e-5
    assert differences[name]["crossed"] > 1e-5


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("memory")
    result = folder / "result.json"
    cases: dict[str, dict[str, Any]] = {"causal 4096": {"length": 4096, "documents": False, "window": None}}
    for length in (4096, 8192, 32768):
        cases[f"documents {length}"] = {"length": length, "documents": True, "window": None}
        cases[f"window {length}"] = {"length": length, "documents": False, "window": 200}
    run_script(Path(__file__).with_name("measure_documents.py"), {"cases": cases, "result": str(result)}, folder)
    return dict(json.loads(result.read_text()))


@pytest.mark.parametrize("kind", ["documents", "window"])
def test_memory_is_that_of_causal_attention_and_linear_in_the_length(kind: str, peaks: dict[str, int]) -> None:
    assert peaks[f"{kind} 4096"] < 1.1 * peaks["causal 4096"]
    assert peaks[f"{kind} 32768"] < 4.4 * peaks[f"{kind} 8192"]
