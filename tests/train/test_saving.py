"""What the ranks save together, each its own part, is the state that they would gather from each other."""

from __future__ import annotations

from pathlib import Path

from helpers.small_models import TINY_SHAPE
from helpers.worlds import run_script


def test_two_ranks_save_a_transposed_model_in_half_precision_at_every_zero_stage(tmp_path: Path) -> None:
    """`train_layouts.py` compares the checkpoint with the state; `test_reshard.py` does so for other layouts."""
    layouts = {f"zero{zero}": {"data": 2, "zero": zero, "precision": "bf16", "micro_batch": 1} for zero in range(4)}
    shape = {"family": "gpt2", **TINY_SHAPE, "kv_heads": 4}
    spec = {"shape": shape, "steps": 2, "save": 1, "sequences": 4, "layouts": layouts, "folder": str(tmp_path)}
    run_script(Path(__file__).with_name("train_layouts.py"), [spec], tmp_path)
    assert sorted(path.parent.name for path in tmp_path.glob("*/step-00000001")) == sorted(layouts)
