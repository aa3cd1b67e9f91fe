"""What counts as a bad batch, and how skipped batches are recorded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from btm_scale.config.layout import Layout
from btm_scale.config.training import HealthConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import GroupFailed
from btm_scale.model.shape import ModelShape
from btm_scale.train import bad_batches
from btm_scale.train.bad_batches import Health


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_batches.dist, "barrier", lambda: None)
    monkeypatch.setattr(bad_batches.dist, "broadcast_object_list", lambda values, src: None)


def group_of_rank(rank: int) -> ExpertGroup:
    return ExpertGroup(Layout(), rank, 2, torch.device("cpu"))


def judge(folder: Path, **settings: Any) -> Health:
    return Health(group_of_rank(0), HealthConfig(**settings), folder, folder / "metrics.jsonl")


def result(loss: float = 2.0, norm: float = 1.0, overflowed: bool = False) -> Any:
    return SimpleNamespace(loss=loss, gradient_norm=norm, overflowed=overflowed)


@pytest.mark.parametrize("bad", [result(loss=math.nan), result(loss=math.inf), result(norm=math.nan)])
def test_a_non_finite_loss_or_gradient_norm_is_a_problem(bad: Any, tmp_path: Path) -> None:
    assert judge(tmp_path).problem(1, bad) is not None


def test_an_fp16_overflow_is_not_a_problem(tmp_path: Path) -> None:
    assert judge(tmp_path).problem(1, result(norm=math.inf, overflowed=True)) is None
    assert judge(tmp_path).problem(1, result(loss=math.nan, norm=math.inf, overflowed=True)) is not None


def test_a_spike_is_a_problem_only_if_configured_and_does_not_change_the_median(tmp_path: Path) -> None:
    strict, lenient = judge(tmp_path, spike=5, window=10), judge(tmp_path)
    for step in range(1, 11):
        assert strict.problem(step, result()) is None
    assert strict.problem(11, result(norm=4.9)) is None
    for step in (12, 13, 14):
        message = strict.problem(step, result(norm=50.0))
        assert message is not None
        assert "50.0 times the recent median" in message
    assert lenient.problem(1, result(norm=1e9)) is None


def test_recent_gradient_norms_are_restored_after_a_restart(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "loss": 1.0, "gradient_norm": 1.0}) for step in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert judge(tmp_path, spike=5, window=10).problem(8, result(norm=6.0)) is not None


def test_an_overflowed_step_does_not_change_the_median_after_a_restart(tmp_path: Path) -> None:
    rows = [{"step": step, "gradient_norm": 1.0} for step in range(1, 6)]
    rows += [{"step": step, "gradient_norm": 1e9, "overflowed": True} for step in range(6, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert judge(tmp_path, spike=5, window=10).problem(11, result(norm=6.0)) is not None


def test_skipped_batches_stay_skipped_and_too_many_are_an_error(tmp_path: Path) -> None:
    judge(tmp_path).leave_out(7, "the loss is nan")
    again = judge(tmp_path, skips=1)
    assert again.leaves_out(7)
    assert not again.leaves_out(8)
    with pytest.raises(GroupFailed, match=r"2 batches were bad, the last one at step 9: the loss is nan"):
        again.leave_out(9, "the loss is nan")


def test_every_rank_skips_the_batches_that_the_first_rank_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(values: list[Any], src: int) -> None:
        values[0] = ({}, {7: "the loss is nan"})

    monkeypatch.setattr(bad_batches.dist, "broadcast_object_list", receive)
    # Its host does not see the file yet.
    late = Health(group_of_rank(1), HealthConfig(), tmp_path, tmp_path / "metrics.jsonl")
    assert late.leaves_out(7)


SHAPE = ModelShape(layers=2, hidden=48, heads=6, kv_heads=2, ffn=96, positions=64, vocabulary=65)


def test_layout_problems_name_values_that_fit() -> None:
    assert Layout(tensor=2, sequence_parallel=True).problems(SHAPE, 64) == []
    (message,) = Layout(tensor=3).problems(SHAPE, 64)
    assert message == (
        "Cannot shard the model over tensor=3. tensor must divide the attention heads (6), KV heads (2) and MLP width "
        "(96): use 1 or 2."
    )
    (message,) = Layout(tensor=2, sequence_parallel=True).problems(SHAPE, 63)
    assert "tensor must divide sequence_length: use 64." in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel": True}, "raise tensor, or remove it"),
        ({"offload": "optimizer", "zero": 0}, "set zero to 1, 2 or 3"),
        ({"offload": "all", "zero": 2}, "set zero to 3"),
        ({"offload_activations": True}, "set recompute to full or tiled"),
        ({"offload_activations": True, "recompute": "selective"}, "set recompute to full or tiled"),
    ],
)
def test_contradictory_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**settings)
