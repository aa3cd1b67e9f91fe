from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.results import Compute, Results
from btm_scale.report import figures
from btm_scale.report.figures.curves import smoothed
from btm_scale.report.figures.matrices import nearness
from btm_scale.report.figures.style import NARROW, literal
from btm_scale.report.sections import sections
from btm_scale.train.jobs import training_job

NAMES = ["<b>x</b>", "%{z}", "&lt;", "<img src=x onerror=alert(1)>", "2021-01-01", "#0072b2"]


def steps(*losses: float) -> list[dict[str, float]]:
    return [{"step": i, "loss": loss} for i, loss in enumerate(losses, start=1)]


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    assert isinstance(figure, go.Figure)
    return {trace.name: trace for trace in figure.data if trace.showlegend is not False}


def test_ratios_are_those_to_dense_in_the_order_of_the_results(make_results):
    figure = figures.perplexity_ratios(make_results(shares={"seed": 1.2, "dense": 1.0, "ensemble": 0.9}))
    assert list(figure.layout.yaxis.ticktext) == ["<b>Mean</b>", "math", "code", "poems"]
    shown = traces(figure)
    assert list(shown) == ["Ensemble", "Own expert", "Seed LM"]
    assert shown["Ensemble"].x == pytest.approx([0.9] * 4)
    assert shown["Own expert"].x == pytest.approx([0.92] * 2)
    assert [round(y) for y in shown["Own expert"].y] == [1, 2]
    assert "13.50, 0.900 of dense" in shown["Ensemble"].hovertext[0]
    assert {"15.00", "10.00", "20.00", "30.00"} <= {note.text for note in figure.layout.annotations}


def test_a_ruined_average_keeps_its_ratio_and_is_named_at_the_edge(make_results):
    figure = figures.perplexity_ratios(make_results(shares={"dense": 1.0, "ensemble": 0.9, "average:posterior": 900.0}))
    assert traces(figure)["Posterior average"].x == pytest.approx([900.0] * 4)
    assert 10 ** figure.layout.xaxis.range[1] < 2
    assert "Posterior average 900.0 \u203a" in [note.text for note in figure.layout.annotations]


def test_losses_lie_on_the_schedule_in_the_order_of_their_ends(config, make_results):
    curves = {"math": steps(3.0, 2.0), "seed": steps(5.0, math.nan, 4.0, 3.5), "code": steps(3.0, 2.5)}
    figure = figures.training_loss(config, make_results(), curves)
    shown = traces(figure)
    assert list(shown) == ["seed", "code", "math"]
    end = config.budget.seed_steps / (config.budget.seed_steps + config.budget.branch_steps)
    assert shown["seed"].x == pytest.approx([end / 4, end * 3 / 4, end])
    assert shown["math"].x == pytest.approx([end + (1 - end) / 2, 1.0])
    assert shown["math"].y == pytest.approx([3.0, 2.0])
    assert shown["seed"].customdata == pytest.approx([1, 3, 4])
    colours = {name: trace.line.color for name, trace in shown.items()}
    assert len(set(colours.values())) == 3
    assert traces(figures.forest(make_results())) is not None


def test_a_model_that_stopped_early_is_not_stretched_to_the_end_of_the_schedule(config, make_results):
    patient = config.model_copy(update={"dev_loss": config.dev_loss.model_copy(update={"patience": 2})})
    total = training_job(patient, "math").steps
    rows = [{"step": step, "loss": 3.0, "dev_loss": 2.5} for step in (1, total // 4)]
    shown = figures.training_loss(patient, make_results(), {"math": rows}).data
    end = patient.budget.seed_steps / (patient.budget.seed_steps + patient.budget.branch_steps)
    for trace in shown:
        assert trace.x[-1] == pytest.approx(end + (1 - end) * (total // 4) / total)


def test_losses_on_dev_text_are_markers_at_their_steps_in_the_colour_of_the_model(config, make_results):
    rows = [row | ({"dev_loss": 2.5} if row["step"] == 2 else {}) for row in steps(3.0, 2.0, 2.0, 2.0)]
    figure = figures.training_loss(config, make_results(), {"math": rows})
    [curve] = traces(figure).values()
    [dev] = [trace for trace in figure.data if trace.mode == "markers"]
    assert (list(dev.x), list(dev.y), list(dev.customdata)) == ([curve.x[1]], [2.5], [2])
    assert dev.marker.color == curve.line.color
    assert "dev loss" in dev.hovertemplate


def test_smoothing_keeps_a_constant_and_a_slope():
    assert smoothed(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    assert smoothed(np.arange(100.0))[50] == pytest.approx(50.0)
    assert smoothed(np.array([2.0])) == pytest.approx([2.0])


def test_the_matrix_has_every_number_with_the_best_of_a_column_bold_and_own_domains_outlined(make_results):
    figure = figures.expert_matrix(make_results())
    (heat,) = figure.data
    assert list(heat.y) == ["Seed LM", "Dense baseline", "math", "code"]
    assert list(heat.x) == ["math", "code", "poems"]
    assert [list(row) for row in heat.text] == [
        ["12.00", "24.00", "36.00"],
        ["10.00", "20.00", "<b>30.00</b>"],
        ["<b>9.200</b>", "34.00", "51.00"],
        ["17.00", "<b>18.40</b>", "51.00"],
    ]
    outlined = [(round(s.x0 + 0.5), round(s.y0 + 0.5)) for s in figure.layout.shapes if s.type == "rect"]
    assert outlined == [(0, 2), (1, 3)]


def test_shades_compare_within_a_column():
    assert nearness([[10.0, 400.0], [20.0, 200.0]]) == [[1.0, 0.0], [0.0, 1.0]]
    assert nearness([[10.0], [None]]) == [[1.0], [None]]


def test_the_prior_is_drawn_as_it_is(make_results):
    results = make_results()
    results.priors["math"] = {"math": 0.997, "code": 0.003}
    (heat,) = figures.prior_matrix(results).data
    assert [list(row) for row in heat.z] == [[0.997, 0.5, 0.5], [0.003, 0.5, 0.5]]
    assert [row[0] for row in heat.text] == ["1.00", "\u00b7"]


def test_the_routing_of_a_mixture_is_drawn_by_domain_and_layer(make_results, config, tmp_path):
    assert "Routing of the mixture" not in [section.title for section in sections(config, make_results(), {})]
    routing = {
        "math": {"math": (0.75, 0.5), "code": (0.25, 0.5)},
        "poems": {"math": (0.125, 0.0), "code": (0.875, 1.0)},
    }
    entropies = {"math": (0.5, 0.25), "poems": (0.75, 0.5)}
    results = make_results().model_copy(update={"routing": routing, "routing_entropy": entropies})
    (heat,) = figures.routing_map(results).data
    assert list(heat.customdata[0])[2] == "router entropy 0.75 nats"
    assert list(heat.x) == ["math 1", "math 2", "poems 1", "poems 2"]
    assert [list(row) for row in heat.z] == [[0.75, 0.5, 0.125, 0.0], [0.25, 0.5, 0.875, 1.0]]
    [section] = [one for one in sections(config, results, {}) if one.title == "Routing of the mixture"]
    assert section.chart is not None
    assert section.chart.words.startswith("The domain's own expert has 0.62 of the uses on average.")
    assert "The routers' mean entropy is 0.50 nats; it would be 0.69 if all" in section.chart.words
    assert [row.name for row in section.chart.table.rows] == ["math", "code", "Router entropy, nats"]
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    of_an_earlier_version = results.model_copy(update={"routing_entropy": {}})
    [section] = [one for one in sections(config, of_an_earlier_version, {}) if one.title == "Routing of the mixture"]
    assert section.chart is not None
    assert "entropy" not in section.chart.words


def test_the_mixture_is_trained_after_the_schedule(make_results, config):
    steps = [{"step": step, "loss": 2.0} for step in (1, 2, 3, 4)]
    trained = RunConfig.model_validate(config.model_dump() | {"moe": {"train": {"budget_share": 0.2}}})
    figure = figures.training_loss(trained, make_results(), {"moe": steps})
    *_, smooth = figure.data
    assert list(smooth.x) == pytest.approx([1.05, 1.1, 1.15, 1.2])
    assert list(figure.layout.xaxis.range) == [0, 1.2]


def test_methods_of_one_kind_with_equal_compute_share_a_bar(make_results):
    results = make_results()
    results.compute.update({f"expert:{name}": Compute(tokens=750, flops=4.5e12) for name in ("math", "code")})
    results.compute["average:uniform"] = results.compute["ensemble"]
    figure = figures.compute(results)
    names = ["Seed LM", "Dense baseline", "Ensemble", "Uniform average", "Each of 2 experts"]
    assert list(figure.layout.yaxis.ticktext) == names
    seed, after = figure.data
    assert [a + b for a, b in zip(seed.x, after.x, strict=True)] == pytest.approx([3e12, 6e12, 6e12, 6e12, 4.5e12])
    assert set(seed.x) == {3e12}


FAMILY = {"seed": {}, "math": {"seed": 1.0}, "code": {"seed": 1.0}, "both": {"math": 0.3, "code": 0.7}}


def test_a_line_for_every_parent_as_thick_as_its_weight_after_the_last_of_the_parents(make_results):
    figure = figures.lineage(make_results().model_copy(update={"lineage": FAMILY}))
    widths = {trace.hovertext: trace.line.width for trace in figure.data}
    assert len(widths) == 4
    assert widths["both began with 70% of code"] / widths["both began with 30% of math"] == pytest.approx(7 / 3)
    places = {note.text: note.x for note in figure.layout.annotations}
    assert places["<b>seed</b>"] < places["<b>math</b>"] == places["<b>code</b>"] < places["<b>both</b>"]


def test_the_forest_names_every_expert_and_the_means(make_results):
    texts = [note.text for note in figures.forest(make_results()).layout.annotations]
    assert {"math", "code", "<b>dense</b>", "18.00", "15.00", "13.50"} <= set(texts)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_escaped_in_every_label_and_in_no_template(config, make_results, name):
    results = make_results(training=(name, "code")).model_copy(
        update={"lineage": {name: {"seed": 1.0}, "b": {name: 1.0}}}
    )
    drawn = [figures.training_loss(config, results, {name: steps(2.0, 1.0)})]
    draws = (figures.forest, figures.lineage, figures.perplexity_ratios, figures.expert_matrix, figures.prior_matrix)
    drawn += [draw(results, width=width) for draw in draws for width in (960, NARROW)]
    for figure in drawn:
        texts = list(_strings(figure.to_dict()))
        assert any(html.escape(name, quote=False) in text for text in texts)
        assert not [text for text in texts if "<" in name and name in text]
        assert not [text for text in _strings(figure.to_dict(), "template") if literal(name) in text]


def _strings(part: Any, key: str = "") -> Iterator[str]:
    """Every string of a figure; with `key`, of entries whose name contains it."""
    if isinstance(part, str):
        yield from [part] if not key else []
    elif isinstance(part, dict):
        for name, value in part.items():
            yield from _strings(value, "" if key in name else key)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from _strings(value, key)


def test_64_experts_have_a_name_in_the_legend_each_and_a_page_of_less_than_6_mb(config, make_results):
    names = [f"domain-{i}" for i in range(64)]
    figure = figures.training_loss(config, make_results(training=names), {name: steps(3.0, 2.0) for name in names})
    assert len(traces(figure)) == 64
    assert figure.layout.height - figure.layout.margin.b - figure.layout.margin.t > 200
    narrow = figures.training_loss(config, make_results(training=names), {n: steps(3.0, 2.0) for n in names}, width=360)
    assert narrow.layout.height - narrow.layout.margin.b - narrow.layout.margin.t > 150
