"""Ranks that share sequences train the model of one rank: with separate documents, a window and few KV heads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.launcher import TESTS
from helpers.small_models import HUGGINGFACE_SIZES, TINY_SHAPE
from helpers.worlds import run_script
from safetensors.torch import load_file

from btm_scale.config.layout import Layout
from btm_scale.config.model import ModelConfig

pytestmark = pytest.mark.slow

STEPS = 20
END_OF_TEXT = 7  # in a quarter of the sequences of `learnable_text`
ONE: dict[str, Any] = {"zero": 0}

MATRIX = [
    {"tensor": tensor, "context": context, "data": data, "zero": zero}
    for tensor, context, data, zero in itertools.product((1, 2), (1, 2), (1, 2), (0, 1, 2, 3))
]
# Each ZeRO stage, tensor and data ranks beside context ranks, each way to recompute, and inputs of layers on the host.
QUICK: list[dict[str, Any]] = [
    {"context": 2, "zero": 0},
    {"context": 2, "zero": 1, "recompute": "selective"},
    {"context": 2, "zero": 3, "recompute": "full", "offload_activations": True},
    {"context": 2, "zero": 2, "recompute": "tiled", "micro_batch": 8},  # tiles of 4 of a rank's 8 tokens
    {"context": 2, "data": 2, "zero": 2},
    {"tensor": 2, "context": 2, "zero": 1, "sequence_parallel": True, "recompute": "full", "offload_activations": True},
    {"tensor": 2, "context": 2, "zero": 3},
]


def kv_heads(layout: dict[str, Any]) -> int:
    """Return KV heads that leave each tensor rank one, so that context ranks copy it."""
    return int(layout.get("tensor", 1))


def specs(folder: Path, layouts: dict[str, dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    """Return a spec of `train_layouts.py` for each number of ranks and of KV heads."""
    worlds: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for name, layout in layouts.items():
        world = Layout.model_validate(layout).ranks, int(name.rpartition("-kv")[2])
        worlds.setdefault(world, {})[name] = {"precision": "fp32", "micro_batch": 2} | layout
    common = {"steps": STEPS, "sequences": 8, "end_of_text": END_OF_TEXT, "folder": str(folder), **more}
    shape = {**TINY_SHAPE, "family": "mistral", "window": 6}
    return [common | {"shape": shape | {"kv_heads": kv}, "layouts": some} for (_, kv), some in worlds.items()]


def trained(folder: Path, *parts: list[dict[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    every = [spec for part in parts for spec in part]
    run_script(TESTS / "train" / "train_layouts.py", every, folder)
    return {name: load_file(folder / f"{name}.safetensors") for spec in every for name in spec["layouts"]}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("layouts", [pytest.param(QUICK, id="seven"), full(MATRIX, id="all")])
def test_context_ranks_have_the_losses_and_gradients_of_one_rank(layouts: list[dict[str, Any]], tmp_path: Path) -> None:
    named = {f"one-kv{kv}": ONE for kv in (1, 2)}
    named |= {f"{'-'.join(map(str, layout.values()))}-kv{kv_heads(layout)}": layout for layout in layouts}
    results = trained(tmp_path, specs(tmp_path, named, gradients=True))
    for name, tensors in results.items():
        expected = results[f"one-kv{name.rpartition('-kv')[2]}"]
        assert len(expected["losses"]) == STEPS
        assert expected["losses"][-1] < expected["losses"][0] - 0.3, "the reference must learn something"
        torch.testing.assert_close(tensors["losses"], expected["losses"], atol=1e-5, rtol=0, msg=name)
        moments = [key for key in expected if key.startswith("exp_avg/")]
        assert len(moments) == len(expected) // 2 - 1
        for key in moments:
            assert relative_error(tensors[key], expected[key]) < 1e-6, (name, key)


def test_a_run_can_share_sequences_for_a_while_and_has_the_losses_that_it_would_have_had(tmp_path: Path) -> None:
    shared = {"context": 2, "zero": 2}
    alone = trained(tmp_path, specs(tmp_path, {"alone-kv1": ONE}))["alone-kv1"]["losses"]
    save = {"before-kv1": 7, "shared-kv1": 13}
    parts = [
        specs(tmp_path, {"before-kv1": ONE}, save=save),
        specs(tmp_path, {"shared-kv1": shared}, save=save, begin={"shared-kv1": "before-kv1"}),
        specs(tmp_path, {"after-kv1": ONE}, save=save, begin={"after-kv1": "shared-kv1"}),
    ]
    results = trained(tmp_path, *parts)
    losses = torch.cat([results[f"{name}-kv1"]["losses"] for name in ("before", "shared", "after")])
    torch.testing.assert_close(losses, alone, atol=1e-5, rtol=0)


def test_training_resumes_with_the_bits_of_a_run_that_was_not_interrupted(tmp_path: Path) -> None:
    layout = {"context": 2, "zero": 2}
    half = {"half-kv1": STEPS // 2}
    parts = [
        specs(tmp_path, {"complete-kv1": layout}),
        specs(tmp_path, {"half-kv1": layout}, save=half),
        specs(tmp_path, {"resumed-kv1": layout}, save=half, begin={"resumed-kv1": "half-kv1"}),
    ]
    results = trained(tmp_path, *parts)
    complete, resumed = results["complete-kv1"], results["resumed-kv1"]
    assert torch.equal(resumed.pop("losses"), complete.pop("losses")[STEPS // 2 :])
    for name in complete.keys() - {"bytes"}:
        assert torch.equal(resumed[name], complete[name]), name


def test_context_ranks_train_a_pretrained_model_whose_positions_are_scaled(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path / "pretrained"
    LlamaForCausalLM(LlamaConfig(**HUGGINGFACE_SIZES, max_position_embeddings=8)).save_pretrained(folder)
    results: dict[str, dict[str, torch.Tensor]] = {}
    for positions, rope in (("scaled", {"type": "yarn", "factor": 4}), ("trained", {"type": "linear", "factor": 1})):
        model = ModelConfig.model_validate({"pretrained": folder, "rope": rope})
        shape = model.shape(vocabulary=1, positions=1).model_dump(mode="json") | {"positions": 32}
        layouts = {f"{positions}-one-kv2": ONE}
        if positions == "scaled":
            layouts |= {"two-kv2": {"context": 2, "zero": 2}, "four-kv2": {"context": 2, "tensor": 2, "zero": 1}}
        given = specs(tmp_path, layouts, pretrained=str(folder))
        results |= trained(tmp_path, [spec | {"shape": shape} for spec in given])
    expected = results["scaled-one-kv2"]["losses"]
    assert expected[-1] < expected[0] - 0.1, "the reference must learn something"
    assert float((results["trained-one-kv2"]["losses"] - expected).abs().max()) > 1e-4, "scaling must matter"
    for name in ("two-kv2", "four-kv2"):
        torch.testing.assert_close(results[name]["losses"], expected, atol=1e-5, rtol=0, msg=name)


def test_documents_and_window_change_the_losses_of_this_text(tmp_path: Path) -> None:
    """Otherwise the other tests would not show that context ranks apply them."""
    with_both = specs(tmp_path, {"both-kv1": ONE})
    [spec] = specs(tmp_path, {"documents-kv1": ONE})
    without_window = spec | {"shape": spec["shape"] | {"window": None}}
    [spec] = specs(tmp_path, {"window-kv1": ONE})
    without_documents = spec | {"end_of_text": None}
    results = trained(tmp_path, with_both, [without_window], [without_documents])
    for name in ("documents", "window"):
        difference = (results[f"{name}-kv1"]["losses"] - results["both-kv1"]["losses"]).abs().max()
        assert float(difference) > 1e-3, name
