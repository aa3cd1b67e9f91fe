"""The activations that a plan counts are those that autograd keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script

from btm_scale.config.layout import Layout
from btm_scale.launch.memory import activation_bytes
from btm_scale.model.families import FAMILIES
from btm_scale.model.shape import ModelShape


def case(
    family: str, recompute: str = "none", precision: str = "bf16", micro_batch: int = 4, **more: Any
) -> dict[str, Any]:
    traits = FAMILIES[family]
    shape = {"family": family, "layers": 3, "hidden": 768, "heads": 12, "vocabulary": 1000, "ffn": 2048}
    kv_heads = 4 if traits.grouped and more.get("grouped", True) else 12
    shape |= {"positions": more.get("positions", 256), "kv_heads": more.get("kv_heads", kv_heads)}
    if traits.windowed:
        shape["window"] = 100
    layout = {"recompute": recompute, "precision": precision, **more.get("layout", {})}
    return {"shape": shape, "layout": layout, "micro_batch": micro_batch, "documents": more.get("documents", False)}


TENSOR = {"tensor": 2}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
CONTEXT = {"context": 2}
CASES = {
    f"{family}, {recompute} recomputation": case(family, recompute)
    for family in FAMILIES
    for recompute in ("none", "selective", "full")
}
CASES |= {f"{family}, separate documents": case(family, documents=True) for family in FAMILIES}
CASES |= {
    "llama, one head per KV head": case("llama", grouped=False),
    "llama, one head per KV head, selective": case("llama", "selective", grouped=False),
    "llama, one sequence with documents": case("llama", micro_batch=1, documents=True),
    "llama, fp32": case("llama", precision="fp32"),
}
CASES |= {
    f"{family}, {recompute} recomputation, {kind} parallel": case(family, recompute, layout=layout)
    for family in ("llama", "gpt2", "qwen3")
    for recompute in ("none", "selective", "full")
    for kind, layout in (("tensor", TENSOR), ("sequence", SEQUENCE), ("context", CONTEXT))
}
CASES |= {
    "mistral, context parallel": case("mistral", layout=CONTEXT),
    "llama, separate documents, context parallel": case("llama", documents=True, layout=CONTEXT),
    "llama, one KV head, context parallel": case("llama", kv_heads=1, layout=CONTEXT),
    "llama, 8,192 tokens": case("llama", micro_batch=1, positions=8192),
    "llama, 8,192 tokens, context parallel": case("llama", micro_batch=1, positions=8192, layout=CONTEXT),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("activations")
    spec = {"cases": CASES, "result": str(folder / "result")}
    run_script(Path(__file__).with_name("measure_activations.py"), spec, folder)
    return {
        name: value for ranks in (1, 2) for name, value in json.loads((folder / f"result-{ranks}").read_text()).items()
    }


@pytest.mark.parametrize("name", CASES)
def test_planned_activations_are_what_autograd_keeps(name: str, measured: dict[str, int]) -> None:
    values = CASES[name]
    shape = ModelShape.model_validate(values["shape"])
    planned = activation_bytes(
        shape,
        Layout.model_validate(values["layout"]),
        micro_batch=values["micro_batch"],
        length=shape.positions,
        separate_documents=values["documents"],
    )
    assert planned == pytest.approx(measured[name], rel=0.05)


def test_two_context_ranks_need_little_more_than_half_of_the_activations(measured: dict[str, int]) -> None:
    assert measured["llama, 8,192 tokens, context parallel"] < 0.6 * measured["llama, 8,192 tokens"]
