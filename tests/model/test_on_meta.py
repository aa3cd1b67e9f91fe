"""Every model family with `meta` in place of a GPU: no tensor stays on the CPU, and no attention is quadratic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

from btm_scale.model.families import FAMILIES, MIXTURES

LAYERS = 2
RECOMPUTE = ("none", "selective", "full", "tiled")
CASES: dict[str, dict[str, Any]] = {
    f"{family}, {recompute} recomputation, {'separate documents' if documents else 'packed text'}": {
        "family": family,
        "recompute": recompute,
        "documents": documents,
    }
    for family in FAMILIES
    for recompute in RECOMPUTE
    for documents in (False, True)
}
CASES |= {family: {"family": family, "recompute": "none", "documents": False} for family in MIXTURES}
TRAINED = {name: case for name, case in CASES.items() if case["family"] in FAMILIES}
MASKED = {name: case for name, case in TRAINED.items() if case["documents"] or FAMILIES[case["family"]].windowed}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("meta")
    spec = {"cases": CASES, "result": str(folder / "result.json")}
    run_script(Path(__file__).with_name("run_on_meta.py"), spec, folder)
    return dict(json.loads((folder / "result.json").read_text()))


@pytest.mark.parametrize("part", ["training", "scoring", "decoding", "serving"])
@pytest.mark.parametrize("name", CASES)
def test_no_tensor_stays_on_the_cpu(name: str, part: str, results: dict[str, Any]) -> None:
    assert results[name][part] == ""


@pytest.mark.parametrize("name", MASKED)
def test_attention_within_documents_and_windows_is_the_flash_kernels(name: str, results: dict[str, Any]) -> None:
    calls = results[name]["calls"]
    forwards = 1 if MASKED[name]["recompute"] == "none" else 2
    assert calls["torch_attn::_varlen_attn"] == forwards * LAYERS
    assert calls["torch_attn::_varlen_attn_backward"] == LAYERS
    assert not any("softmax" in operator for operator in calls)
    assert not results[name]["squares"]
