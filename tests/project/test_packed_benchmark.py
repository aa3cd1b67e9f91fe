"""The committed times and the work of data ranks with separate documents meet their goals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PACKED: dict[str, Any] = json.loads((BENCHMARKS / "results" / "packed.json").read_text())


def test_short_documents_do_not_make_a_step_slower_than_causal_attention() -> None:
    assert PACKED["case"]["length"] == 2048
    assert PACKED["steps"]["documents of 300"]["ratio"] <= 1.0


def test_the_most_loaded_data_rank_has_little_more_work_than_the_mean() -> None:
    for found in PACKED["imbalance"].values():
        assert found["balanced"]["max"] <= 1.05 < found["text order"]["mean"]
