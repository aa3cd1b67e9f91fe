from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btm_scale.evaluate.results import Compute
from btm_scale.report.chart_data import compute_bars, nearness, training_curves
from btm_scale.report.charts import fit, round_ticks, spread, text_width
from btm_scale.report.line_chart import smoothed
from btm_scale.report.plots import RatioRow, ratio_chart


@given(st.lists(st.floats(-50, 350), min_size=1, max_size=40))
def test_labels_keep_apart_and_inside_as_far_as_there_is_room(positions):
    placed = spread(positions, 16.0, 0.0, 300.0)
    gap = min(16.0, 300.0 / max(1, len(positions) - 1))
    assert min(placed) >= -1e-6
    assert max(placed) <= 300 + 1e-6
    assert all(b - a >= gap - 1e-6 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))


@given(st.text(max_size=80), st.floats(20, 200))
def test_a_fitted_label_is_no_wider_than_its_room(words, room):
    assert text_width(fit(words, room)) <= max(room, text_width("\u2026"))


def test_a_shortened_label_keeps_both_ends():
    assert fit("a-long-prefix-of-a-name-legal", 110).startswith("a-lo")
    assert fit("a-long-prefix-of-a-name-legal", 110).endswith("legal")


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.3), (2.1, 4.6), (0, 1e-3), (5, 5000)])
def test_ticks_are_round_inside_and_few(low, high):
    ticks = round_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 8
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high + 1e-9


def test_smoothing_keeps_a_constant_and_halves_no_step():
    assert smoothed(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    assert smoothed(np.arange(100.0))[50] == pytest.approx(50.0)
    assert smoothed(np.array([2.0])) == pytest.approx([2.0])


def test_marks_that_would_cover_each_other_are_moved_apart():
    row = RatioRow("math", "10", {"a": 1.1, "b": 1.1, "c": 1.3}, {"a": "11", "b": "11", "c": "13"})
    drawn = ratio_chart([row], {"a": "square", "b": "diamond", "c": "cross"}, "Dense", title="t", width=960)
    marks = re.findall(r'translate\([\d.]+ ([\d.]+)\)" class="mark (\w+)"', drawn)
    heights = {shape: float(y) for y, shape in marks}
    assert heights["square"] == heights["cross"]
    assert abs(heights["square"] - heights["diamond"]) > 8


def test_a_mark_beyond_the_axis_is_drawn_at_its_edge_with_its_number():
    row = RatioRow("math", "10", {"a": 1.1, "b": 900.0}, {"a": "11", "b": "9,000"})
    drawn = ratio_chart([row], {"a": "square", "b": "diamond"}, "Dense", title="t", width=960)
    assert "900.0 \u203a" in drawn
    assert max(float(x) for x in re.findall(r"translate\(([\d.]+) ", drawn)) < 960


def test_shades_compare_within_a_column():
    assert nearness([[10.0, 400.0], [20.0, 200.0]]) == [[1.0, 0.0], [0.0, 1.0]]
    assert nearness([[10.0], [None]]) == [[1.0], [None]]


def test_branches_begin_where_the_seed_ends(config):
    steps = [{"step": i, "loss": 3.0} for i in range(1, 11)]
    curves, dropped = training_curves(config, {"math": steps, "seed": steps}, {"math": "c0"})
    ends = {curve.name: (curve.x[0], curve.x[-1]) for curve in curves}
    seed_end = config.budget.seed_steps / (config.budget.seed_steps + config.budget.branch_steps)
    assert ends["seed"][1] == pytest.approx(seed_end)
    assert ends["math"][0] > seed_end
    assert ends["math"][1] == pytest.approx(1.0)
    assert dropped == 0


def test_methods_of_one_kind_with_equal_compute_share_a_bar(make_results):
    results = make_results()
    results.compute.update({f"expert:{name}": Compute(tokens=750, flops=4.5e12) for name in ("math", "code")})
    results.compute["average:uniform"] = results.compute["ensemble"]
    bars = {bar.name: bar for bar in compute_bars(results)}
    assert list(bars) == ["Seed LM", "Dense baseline", "Ensemble", "Uniform average", "Each of 2 experts"]
    assert bars["Each of 2 experts"].length == 4.5e12
    assert bars["Ensemble"].before == results.compute["seed"].flops
