"""A chosen mixture on the page and on the terminal."""

from __future__ import annotations

import io

import pytest
from helpers.mixtures import chosen_mixture
from rich.console import Console

from btm_scale.evaluate.mixture_record import CriticalReplay, MixtureRecord
from btm_scale.report import figures
from btm_scale.report.figures.style import NARROW
from btm_scale.report.mixture_table import cost_sentence, print_mixture, trust
from btm_scale.report.page import render_page
from btm_scale.report.replay_table import print_replay, replay_sentences
from btm_scale.report.sections import sections

COST = {"runs": 24, "to_measure": 20, "tokens": 2_000_000, "disk_bytes": 5_000_000, "seconds": 34.0}


def printed(chosen, width=120):
    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_mixture(chosen, console)
    return console.file.getvalue()


def test_every_measured_average_and_the_chosen_mixture_are_drawn():
    chosen = chosen_mixture()
    for width in (960, NARROW):
        figure = figures.mixture_fit(chosen, width=width)
        dots = [trace for trace in figure.data if trace.mode == "markers" and len(trace.x) > 1]
        stars = [trace for trace in figure.data if trace.marker.symbol == "star"]
        assert [trace.name for trace in dots] == ["math", "code"]
        assert [len(trace.x) for trace in dots] == [24, 24]
        seed = chosen.perplexity["math"].seed
        assert dots[0].y[0] == pytest.approx(chosen.measured[0].perplexity["math"] / seed)
        assert dots[0].x[0] == pytest.approx(chosen.measured[0].predicted["math"] / seed)
        assert [star.x[0] for star in stars] == pytest.approx(
            [one.predicted / one.seed for one in chosen.perplexity.values()]
        )


def test_the_page_has_a_section_of_the_mixture_if_one_was_chosen(config, make_results):
    chosen = chosen_mixture(keep={"general": 1.02})
    assert "Data mixture" not in [section.title for section in sections(config, make_results(), {})]
    shown = sections(config, make_results(), {}, MixtureRecord(chosen=chosen))
    [section] = [one for one in shown if one.title == "Data mixture"]
    assert section.chart is not None
    words = "on math, code, of a model that is trained on it, keeping the average's on general within 1.02 times"
    assert words in section.chart.words
    assert "of a trained model" in section.chart.words
    assert [row.name for row in section.chart.table.rows] == ["math", "code", "general", "mean"]
    assert [row.name for row in section.table.rows] == ["code", "math", "seed"]
    page = render_page(config, make_results(), {}, mixtures=MixtureRecord(chosen=chosen))
    assert "Data mixture" in page
    assert 'data-name="mixture"' in page


def test_the_page_says_so_if_no_trained_model_was_predicted(config, make_results):
    chosen = chosen_mixture(["math", "code"])
    shown = sections(config, make_results(), {}, MixtureRecord(chosen=chosen))
    [section] = [one for one in shown if one.title == "Data mixture"]
    assert "on math, code, of the average. Each dot" in section.chart.words
    assert "trained" not in section.chart.words


def test_the_terminal_shows_predictions_weights_and_the_distance_to_what_was_measured():
    chosen = chosen_mixture()
    text = printed(chosen)
    assert "1.000" in text.partition("\n")[2]
    assert "mean" in text
    assert "Weights: code 0." in text
    assert "The nearest of 24 measured averages differs in" in text


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("longest", [4, 20, 64])
def test_a_narrow_terminal_shortens_names_and_leaves_columns_out_but_cuts_no_number(width, longest):
    names = [f"{name}{'-' * (longest - len(name) - 1)}x" for name in ("law", "med")]
    chosen = chosen_mixture([*names, "seed"])
    huge = chosen.perplexity[names[0]].model_copy(update={"seed": 12345.6, "interval": (9876.5, 12345.6)})
    law = {name: fit.model_copy(update={"law": "exponential"}) for name, fit in chosen.fit.items()}
    changed = chosen.model_copy(update={"perplexity": {**chosen.perplexity, names[0]: huge}, "fit": law})
    lines = [line.split() for line in printed(changed, width).splitlines()]
    begin = next(i for i, words in enumerate(lines) if words[0] == "text")
    rows = lines[begin : begin + 4]
    assert rows[0][-1] == "R2"
    for row in rows[1:3]:
        assert row[-1] == "1.000"
        assert not any("\u2026" in word for word in row[1:])
    if width == 120:
        assert rows[0][1:] == ["seed", "uniform", "average", "95%", "trained", "law", "R2"]


@pytest.mark.parametrize("width", [60, 80])
def test_the_table_of_replay_cuts_no_number(width):
    named = dict.fromkeys(("law-and-order-and-more-of-it", "general-text-of-the-web"), 1.02)
    one = REPLAY.measured[0].model_copy(update={"run": "/a/long/path/of/a/run/with/replay", "perplexity": named})
    fits = dict(zip(named, REPLAY.fit.values(), strict=True))
    console = Console(width=width, file=io.StringIO(), highlight=False)
    print_replay(REPLAY.model_copy(update={"perplexity": named, "fit": fits, "measured": (one,)}), console)
    row = console.file.getvalue().splitlines()[2].split()
    assert row[1:] == ["0.100", "0.133", "4,000", "1.020", "1.020"]


def test_an_extrapolation_and_a_poor_law_are_said():
    chosen = chosen_mixture()
    assert not [words for words in trust(chosen) if "extrapolates" in words or "No law" in words]
    poor = {name: fit.model_copy(update={"r2": 0.5}) for name, fit in chosen.fit.items()}
    doubtful = chosen.model_copy(update={"extrapolated": ("math",), "fit": poor})
    assert any("This extrapolates: for math, the law is less certain" in words for words in trust(doubtful))
    assert any("No law predicts math, code well" in words for words in trust(doubtful))


def test_experts_without_replay_are_named_since_their_averages_can_mislead():
    chosen = chosen_mixture()
    assert not [words for words in trust(chosen) if "Trained on a single domain" in words]
    alone = chosen.model_copy(update={"unreplayed": tuple("abcdefghij")})
    assert any(
        "Trained on a single domain: a, b, c, d, e, f, g, h and 2 more models" in words for words in trust(alone)
    )


REPLAY = CriticalReplay.model_validate(
    {
        "target": "law",
        "keep": {"general": 1.02},
        "tokens": 4000,
        "share": 0.21,
        "replay": 0.28,
        "ratio": 0.79,
        "range": (0.19, 0.24),
        "perplexity": {"law": 0.7, "general": 1.02},
        "fit": {name: {"law": "power", "error": 0.001, "r2": 0.99, "laws": {}} for name in ("law", "general")},
        "measured": [
            {
                "run": "<b>a</b>",
                "share": 0.1,
                "replay": 0.133,
                "tokens": 4000,
                "perplexity": {"law": 0.65, "general": 1.1},
                "predicted": {"law": 0.65, "general": 1.1},
            }
        ],
        "is_smallest": False,
        "extrapolated": False,
    }
)


def test_the_critical_share_is_on_the_page_with_the_runs_and_what_is_doubtful(config, make_results):
    page = render_page(config, make_results(), {}, mixtures=MixtureRecord(replay=REPLAY))
    assert "With 0.210 of its text from other domains, &#39;law&#39; is predicted to keep general within" in page
    assert "experts.law.branch.replay: 0.280" in page
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    shown = sections(config, make_results(), {}, MixtureRecord(replay=REPLAY))
    [section] = [one for one in shown if one.title == "Replay"]
    assert [row.name for row in section.table.rows] == ["<b>a</b>", "predicted"]
    poor = {name: fit.model_copy(update={"r2": 0.1}) for name, fit in REPLAY.fit.items()}
    doubtful = REPLAY.model_copy(update={"is_smallest": True, "extrapolated": True, "fit": poor})
    said = " ".join(replay_sentences(doubtful))
    for words in ("the smallest share of the runs", "This extrapolates", "No law predicts law, general well"):
        assert words in said
        assert words not in " ".join(replay_sentences(REPLAY))


def test_the_cost_has_averages_tokens_space_and_time():
    words = "20 of 24 averages to measure: 2 million tokens to score, 5 MB of disk space at a time, about 34 s"
    assert cost_sentence(COST) == words
    assert "an unknown time" in cost_sentence(COST | {"seconds": None})
    assert cost_sentence(COST | {"to_measure": 0}) == "All 24 averages are measured already."


@pytest.mark.parametrize("name", ["<b>x</b>", "</script>", "[red]x\x1b]0;t\x07", "%{z}"])
def test_names_are_shown_literally(name, config, make_results):
    chosen = chosen_mixture([name, "seed"], keep={"<i>": 2.0})
    figure = figures.mixture_fit(chosen)
    assert all("<b>x</b>" not in (trace.name or "") for trace in figure.data)
    page = render_page(config, make_results(), {}, mixtures=MixtureRecord(chosen=chosen))
    assert "<i>" not in page.partition("<main>")[2].partition("</main>")[0].replace("\\u003ci\\u003e", "")
    assert "\x1b" not in printed(chosen)
