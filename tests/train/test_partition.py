"""ZeRO 3 never holds the complete model, not even while it is built."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.worlds import run_script

SHAPE = {"layers": 24, "hidden": 192, "heads": 4, "kv_heads": 2, "ffn": 512, "positions": 32, "vocabulary": 512}


def test_a_rank_of_four_builds_a_quarter_of_the_model_and_one_layer(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    run_script(Path(__file__).with_name("build_partitioned.py"), {"shape": SHAPE, "result": str(result)}, tmp_path)
    bytes_of = json.loads(result.read_text())
    assert bytes_of["peak"] <= 1.3 * (bytes_of["weights"] / 4 + bytes_of["layer"])
    assert bytes_of["equal"], "the same weights as without ZeRO"
