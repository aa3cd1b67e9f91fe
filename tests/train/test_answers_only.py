"""Training on answers alone: every target of a step counts the same, however ranks and micro-batches divide it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.worlds import run_script
from safetensors.torch import load_file

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "positions": 32, "vocabulary": 65}
SHORT: list[dict[str, Any]] = [
    {"micro_batch": 1},
    {"data": 2, "micro_batch": 2},
    {"tensor": 2, "sequence_parallel": True, "micro_batch": 2},
    {"context": 2, "zero": 2, "micro_batch": 2},
]
MORE: list[dict[str, Any]] = [
    {"data": 2, "zero": 3, "micro_batch": 4},
    {"data": 2, "zero": 1, "micro_batch": 1},
    {"data": 2, "zero": 2, "micro_batch": 4, "recompute": "full"},
    {"tensor": 2, "data": 2, "zero": 2, "micro_batch": 2},
    {"context": 2, "data": 2, "zero": 3, "micro_batch": 1},
    {"tensor": 2, "context": 2, "zero": 1, "micro_batch": 2, "recompute": "selective"},
]


def trained(folder: Path, answers: float | None, layouts: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Return the losses and weights after a few steps in each layout."""
    specs = []
    for number, layout in enumerate(layouts):
        spec = {"shape": SHAPE, "steps": 6, "sequences": 8, "folder": str(folder)}
        spec |= {"layouts": {str(number): {"precision": "fp32", **layout}}}
        specs.append(spec | ({} if answers is None else {"answers": answers}))
    folder.mkdir()
    run_script(Path(__file__).with_name("train_layouts.py"), specs, folder)
    return [load_file(folder / f"{number}.safetensors") for number in range(len(layouts))]


@pytest.mark.parametrize("layouts", [pytest.param(SHORT, id="short"), full(MORE, id="more")])
def test_every_layout_trains_the_same_model_on_answers(layouts: list[dict[str, Any]], tmp_path: Path) -> None:
    whole, *others = trained(tmp_path / "answers", 0.3, [{"micro_batch": 8}, *layouts])
    for other in others:
        torch.testing.assert_close(other["losses"], whole["losses"], atol=1e-5, rtol=0)
        for name, tensor in whole.items():
            if name not in ("losses", "bytes"):
                torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)


def test_if_all_tokens_are_answers_the_model_is_that_of_plain_text(tmp_path: Path) -> None:
    [flagged] = trained(tmp_path / "flagged", 1.0, [{"micro_batch": 4}])
    [plain] = trained(tmp_path / "plain", None, [{"micro_batch": 4}])
    torch.testing.assert_close(flagged["losses"], plain["losses"], atol=1e-6, rtol=0)
