"""Attention whose ranks share sequences."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers.worlds import run_script

from btm_scale.model.rotary import Rotary
from btm_scale.model.shape import ModelShape, RopeScaling, kv_head_copies

# As many KV heads as context ranks, more, fewer, and numbers of which neither divides the other.
HEADS = [(4, 4), (8, 8), (4, 1), (12, 6), (12, 3)]


def test_context_ranks_compute_the_attention_of_one_rank(tmp_path: Path) -> None:
    specs = [{"ranks": ranks, "heads": HEADS, "result": str(tmp_path / f"{ranks}")} for ranks in (2, 4)]
    run_script(Path(__file__).with_name("share_sequences.py"), specs, tmp_path)
    for ranks in (2, 4):
        for rank in range(ranks):
            results = json.loads((tmp_path / f"{ranks}-{rank}").read_text())
            for heads, errors in zip(HEADS, results, strict=True):
                assert max(errors) < 1e-13, (ranks, rank, heads)


def test_kv_heads_are_copied_until_context_ranks_can_share_them_equally() -> None:
    assert [kv_head_copies(*numbers) for numbers in ((4, 4), (8, 4), (1, 4), (6, 4), (2, 3))] == [1, 1, 4, 2, 3]


def test_a_part_of_a_sequence_is_rotated_by_its_positions_in_the_sequence() -> None:
    heads = torch.randn(12, 1, 2, 8)
    scaling = RopeScaling(kind="yarn", factor=4.0, original=8, low=1.0, high=32.0, attention=1.1)
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn": 8, "positions": 32, "vocabulary": 8}
    shape = ModelShape(**sizes, rope_scaling=scaling)
    complete = Rotary(shape)(heads)
    for part in range(3):
        here = slice(4 * part, 4 * part + 4)
        assert torch.equal(Rotary(shape, part)(heads[here]), complete[here])
