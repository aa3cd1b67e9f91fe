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
    shape = {"family": family, "layers": 3, "hidden": more.get("hidden", 768), "heads": 12, "vocabulary": 1000}
    kv_heads = 4 if traits.grouped and more.get("grouped", True) else 12
    shape |= {"positions": more.get("positions", 256), "kv_heads": more.get("kv_heads", kv_heads), "ffn": 2048}
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
    "llama, fp32, separate documents": case("llama", precision="fp32", documents=True),
    "qwen3, fp32, separate documents, selective": case("qwen3", "selective", precision="fp32", documents=True),
    "llama, separate documents, odd head size": case("llama", documents=True, hidden=744),
    "qwen3, one sequence with documents, odd head size": case("qwen3", micro_batch=1, documents=True, hidden=744),
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
    "llama, fp32, separate documents, context parallel": case("llama", "none", "fp32", documents=True, layout=CONTEXT),
    "llama, odd head size, context parallel": case("llama", documents=True, hidden=744, layout=CONTEXT),
    "llama, one KV head, context parallel": case("llama", kv_heads=1, layout=CONTEXT),
    "llama, 8,192 tokens": case("llama", micro_batch=1, positions=8192),
    "llama, 8,192 tokens, context parallel": case("llama", micro_batch=1, positions=8192, layout=CONTEXT),
}


# What autograd keeps of a tile is inside of a checkpoint, where it is not measured.
TILED = {
    f"{family}, tiled recomputation, {kind}": case(family, "tiled", layout=layout, positions=1024)
    for family in ("llama", "gpt2")
    for kind, layout in (("one rank", {}), ("sequence parallel", SEQUENCE))
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    folder = tmp_path_factory.mktemp("activations")
    spec = {"cases": CASES | TILED, "result": str(folder / "result")}
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


@pytest.mark.parametrize("name", TILED)
def test_planned_activations_of_tiles_are_what_autograd_keeps(name: str, measured: dict[str, int]) -> None:
    values = TILED[name]
    shape, layout = ModelShape.model_validate(values["shape"]), Layout.model_validate(values["layout"])
    given = {"micro_batch": values["micro_batch"], "length": shape.positions}
    planned = activation_bytes(shape, layout, **given)
    parts = layout.tensor if layout.sequence_parallel else 1  # each of which has tiles of as many tokens as `hidden`
    inner = 2 * (3 if shape.traits.gated else 2) * shape.ffn / layout.tensor * shape.hidden * parts
    assert planned == pytest.approx(measured[name] + inner, rel=0.05)
    assert planned < activation_bytes(shape, layout.model_copy(update={"recompute": "full"}), **given)


def test_two_context_ranks_need_little_more_than_half_of_the_activations(measured: dict[str, int]) -> None:
    assert measured["llama, 8,192 tokens, context parallel"] < 0.6 * measured["llama, 8,192 tokens"]
