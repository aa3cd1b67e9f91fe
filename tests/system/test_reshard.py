"""A run resumes in another layout than the one it was saved in, including optimizer state."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuts import full
from helpers.launcher import TESTS
from helpers.small_models import TINY_SHAPE
from helpers.worlds import run_script
from safetensors.torch import load_file

from btm_scale.config.layout import Layout

pytestmark = pytest.mark.slow

SAVED, STEPS = 10, 30

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"zero": 0},
    "one-zero3-offloaded": {"zero": 3, "offload": "all"},
    "data2-zero1": {"data": 2, "zero": 1},
    "data2-zero2-offloaded": {"data": 2, "zero": 2, "offload": "optimizer"},
    "data2-zero3": {"data": 2, "zero": 3},
    "tensor2-zero0": {"tensor": 2, "zero": 0, "sequence_parallel": True},
    "tensor2-zero3": {"tensor": 2, "zero": 3},
    "four-zero1": {"tensor": 2, "data": 2, "zero": 1},
    "four-zero2": {"tensor": 2, "data": 2, "zero": 2, "sequence_parallel": True},
    "four-zero3": {"tensor": 2, "data": 2, "zero": 3, "recompute": "full"},
    "context2-zero2": {"context": 2, "zero": 2},
    # With local steps, everything but `data` may change.
    "data2-local": {"data": 2, "zero": 1, "sync_every": 5},
    "four-local": {"tensor": 2, "data": 2, "zero": 2, "sync_every": 5},
}

# The layout each one resumes from: more, fewer and equally many ranks, into and out of every ZeRO stage.
FROM = {
    "one": "four-zero3",
    "one-zero3-offloaded": "data2-zero1",
    "data2-zero1": "tensor2-zero3",
    "data2-zero2-offloaded": "four-zero1",
    "data2-zero3": "one",
    "tensor2-zero0": "data2-zero3",
    "tensor2-zero3": "tensor2-zero0",
    "four-zero1": "one-zero3-offloaded",
    "four-zero2": "data2-zero2-offloaded",
    "four-zero3": "four-zero2",
    "context2-zero2": "tensor2-zero3",
    "data2-local": "four-local",
    "four-local": "data2-local",
}


# The same for `make test`: every ZeRO stage, offload, sequence parallelism, and local steps once.
QUICK = {
    "one": "four-zero3",
    "data2-zero2-offloaded": "tensor2-zero0",
    "data2-zero3": "one",
    "tensor2-zero0": "data2-zero3",
    "four-zero1": "data2-zero2-offloaded",
    "four-zero3": "four-zero1",
    "data2-local": "four-local",
    "four-local": "data2-local",
}


def by_ranks(names: Iterable[str]) -> dict[int, dict[str, dict[str, Any]]]:
    groups: dict[int, dict[str, dict[str, Any]]] = {}
    for name in names:
        layout = LAYOUTS[name]
        ranks = Layout.model_validate(layout).ranks
        groups.setdefault(ranks, {})[name] = layout | {"precision": "fp32", "micro_batch": 2}
    return groups


@pytest.mark.parametrize("origins", [pytest.param(QUICK, id="quick"), full(FROM, id="all")])
def test_the_next_twenty_losses_are_those_of_a_run_that_kept_its_layout(
    origins: dict[str, str], tmp_path: Path
) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    common = {"shape": {"family": "llama", **TINY_SHAPE}, "steps": STEPS, "sequences": 8}
    specs = []
    for name in ("one", "data2-local"):
        kept = {name: LAYOUTS[name] | {"precision": "fp32", "micro_batch": 2}}
        specs.append(common | {"layouts": kept, "folder": str(uninterrupted)})
    for more in ({"save": SAVED}, {"save": SAVED, "begin": origins}):
        for layouts in by_ranks(origins).values():
            specs.append(common | more | {"layouts": layouts, "folder": str(tmp_path)})
    run_script(TESTS / "train" / "train_layouts.py", specs, tmp_path)

    for name, origin in origins.items():
        is_local = "sync_every" in LAYOUTS[name]
        expected = load_file(uninterrupted / f"{'data2-local' if is_local else 'one'}.safetensors")["losses"]
        losses = load_file(tmp_path / f"{name}.safetensors")["losses"]
        message = f"saved as {origin}, resumed as {name}"
        assert len(losses) == STEPS - SAVED, message
        torch.testing.assert_close(losses, expected[SAVED:], atol=1e-4 if is_local else 1e-5, rtol=0, msg=message)
